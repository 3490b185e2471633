"""What ``config.json`` says alike of every decoder with sigmoid-routed experts, checked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator

from mortise.errors import ModelConfigError
from mortise.layers.rotary import YarnScaling

if TYPE_CHECKING:
    from collections.abc import Mapping


class RoutedDecoderConfig(BaseModel):
    """Sizes of a decoder, of its experts and of their router (DeepSeek-V3's).

    Names are as published, unknown fields are ignored. Both spellings of the rotary fields are
    read: the hub's ``rope_theta`` with ``rope_scaling`` and transformers 5's ``rope_parameters``.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    model_type: str
    vocab_size: PositiveInt
    hidden_size: PositiveInt
    num_hidden_layers: PositiveInt
    num_nextn_predict_layers: int = Field(default=0, ge=0)
    max_position_embeddings: PositiveInt
    rms_norm_eps: float = Field(default=1e-6, ge=0)
    tie_word_embeddings: bool = False
    eos_token_id: int | tuple[int, ...] | None = None
    torch_dtype: str | None = None

    intermediate_size: PositiveInt
    moe_intermediate_size: PositiveInt
    first_k_dense_replace: int = Field(default=0, ge=0)
    n_routed_experts: PositiveInt
    n_shared_experts: int = Field(default=1, ge=0)
    num_experts_per_tok: PositiveInt
    n_group: PositiveInt = 1
    topk_group: PositiveInt = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    scoring_func: Literal["sigmoid"] = "sigmoid"
    topk_method: Literal["noaux_tc"] = "noaux_tc"
    hidden_act: Literal["silu"] = "silu"

    num_attention_heads: PositiveInt
    attention_bias: bool = False
    rope_theta: float = Field(default=10000.0, gt=0)
    yarn: YarnScaling | None = None

    @classmethod
    def from_dict(cls, raw: Mapping[str, object]) -> Self:
        """Read a parsed ``config.json``.

        Raises:
            ModelConfigError: a field is missing, of the wrong type, or contradicts another.
        """
        fields = {**cls.fields_of(raw), **rotary_fields(raw)}
        if fields.get("torch_dtype") is None:
            fields["torch_dtype"] = raw.get("dtype")
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            raise ModelConfigError(
                f"config.json does not describe a {raw.get('model_type')} model",
                details=[
                    f"{'.'.join(map(str, problem['loc'])) or 'config'}: {problem['msg']}"
                    f" (got {problem['input']!r})"[:300]
                    for problem in error.errors()
                ],
                remedy="take config.json from the published model, unedited",
            ) from None

    @classmethod
    def fields_of(cls, raw: Mapping[str, object]) -> dict[str, object]:
        """The fields of this class, where ``config.json`` spells them in more than one way."""
        return dict(raw)

    @model_validator(mode="after")
    def _experts_can_be_chosen(self) -> Self:
        per_group, rest = divmod(self.n_routed_experts, self.n_group)
        if rest:
            raise ValueError(
                f"n_routed_experts {self.n_routed_experts} is not a multiple of "
                f"n_group {self.n_group}"
            )
        if self.n_group > 1 and per_group < 2:
            raise ValueError("a group needs at least two experts")
        if self.topk_group > self.n_group:
            raise ValueError(f"topk_group {self.topk_group} is more than n_group {self.n_group}")
        if self.num_experts_per_tok > self.topk_group * per_group:
            raise ValueError(
                f"num_experts_per_tok {self.num_experts_per_tok} is more than the "
                f"{self.topk_group * per_group} experts in topk_group groups"
            )
        return self

    @model_validator(mode="after")
    def _yarn_stretches(self) -> Self:
        if self.yarn and min(self.yarn.factor, self.yarn.original_max_position_embeddings) <= 0:
            raise ValueError("factor and original_max_position_embeddings of YaRN must be positive")
        return self

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Every token that ends a text."""
        if self.eos_token_id is None:
            return ()
        return (self.eos_token_id,) if isinstance(self.eos_token_id, int) else self.eos_token_id

    def is_dense(self, layer: int) -> bool:
        """Whether a layer has a plain SwiGLU block instead of experts."""
        return layer < self.first_k_dense_replace


def rotary_fields(raw: Mapping[str, object]) -> dict[str, object]:
    """``rope_theta`` and ``yarn`` from either spelling.

    Raises:
        ModelConfigError: the scaling is no table, or of an unknown kind.
    """
    scaling = rotary_table(raw)
    theta = scaling.get("rope_theta", raw.get("rope_theta", 10000.0))
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return {"rope_theta": theta, "yarn": None}
    if kind != "yarn":
        raise ModelConfigError(f"rope_scaling type {kind!r}", expected='"default" or "yarn"')
    names = YarnScaling.__dataclass_fields__
    yarn = {name: value for name, value in scaling.items() if name in names and value is not None}
    original, whole = (
        yarn.get("original_max_position_embeddings"),
        raw.get("max_position_embeddings"),
    )
    if "factor" not in yarn and isinstance(original, int) and isinstance(whole, int) and original:
        # Leaving the factor to the ratio of the two lengths is how some checkpoints say it.
        yarn["factor"] = whole / original
    return {"rope_theta": theta, "yarn": yarn}


def rotary_table(raw: Mapping[str, object]) -> dict[str, object]:
    """``rope_parameters``, or ``rope_scaling``, or nothing.

    Raises:
        ModelConfigError: it is no table.
    """
    table = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(table, dict):
        raise ModelConfigError(f"rope_scaling is {table!r}", expected="a table")
    return table
