"""What ``config.json`` says of a DeepSeek-V3 or DeepSeek-V3.2 model, or a relative, checked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator

from mortise.errors import ModelConfigError
from mortise.layers.mla import MLAShape
from mortise.layers.rotary import YarnScaling

if TYPE_CHECKING:
    from collections.abc import Mapping


LATENT_NORM_EPS: Final = 1e-6
"""Epsilon of the norms of both latents, whatever ``rms_norm_eps`` says.

So in transformers' models and in the authors' own code (``inference/model.py``). Engines that read
``rms_norm_eps`` here compute the same only where it is 1e-6, as DeepSeek published it.
"""


class LatentMoEConfig(BaseModel):
    """The fields that latent attention and experts are built from, in every family that has both.

    Names are as published, unknown ones are ignored. Both spellings of the rotary fields are read:
    the hub's ``rope_theta`` with ``rope_scaling`` and transformers 5's ``rope_parameters``.
    ``index_*`` are None where attention has no indexer.
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
    moe_layer_freq: Literal[1] = 1

    num_attention_heads: PositiveInt
    q_lora_rank: PositiveInt | None = None
    kv_lora_rank: PositiveInt
    qk_nope_head_dim: PositiveInt
    qk_rope_head_dim: PositiveInt
    v_head_dim: PositiveInt
    attention_bias: bool = False
    rope_interleave: bool = True
    rope_theta: float = Field(default=10000.0, gt=0)
    yarn: YarnScaling | None = None

    index_n_heads: PositiveInt | None = None
    index_head_dim: PositiveInt | None = None
    index_topk: PositiveInt | None = None
    indexer_rope_interleave: bool = False

    @classmethod
    def from_dict(cls, raw: Mapping[str, object]) -> Self:
        """Read a parsed ``config.json``.

        Raises:
            ModelConfigError: a field is missing, of the wrong type, or contradicts another.
        """
        fields = {**cls.fields_of(raw), **_rope_fields(raw)}
        fields.setdefault("torch_dtype", raw.get("dtype"))
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
    def _consistent(self) -> Self:
        if self.n_routed_experts % self.n_group:
            raise ValueError(
                f"n_routed_experts {self.n_routed_experts} is not a multiple of "
                f"n_group {self.n_group}"
            )
        if self.n_group > 1 and self.n_routed_experts // self.n_group < 2:
            raise ValueError("a group needs at least two experts")
        if self.topk_group > self.n_group:
            raise ValueError(f"topk_group {self.topk_group} is more than n_group {self.n_group}")
        choosable = self.topk_group * (self.n_routed_experts // self.n_group)
        if self.num_experts_per_tok > choosable:
            raise ValueError(
                f"num_experts_per_tok {self.num_experts_per_tok} is more than the {choosable} "
                "experts in topk_group groups"
            )
        if self.yarn and min(self.yarn.factor, self.yarn.original_max_position_embeddings) <= 0:
            raise ValueError("factor and original_max_position_embeddings of YaRN must be positive")
        if self.qk_rope_head_dim % 2:
            raise ValueError(f"qk_rope_head_dim {self.qk_rope_head_dim} is odd")
        if self.index_head_dim is not None and self.index_head_dim < self.qk_rope_head_dim:
            raise ValueError("index_head_dim is less than qk_rope_head_dim")
        return self

    @property
    def has_indexer(self) -> bool:
        """Whether attention is sparse."""
        return self.index_topk is not None

    @property
    def sharing_layers(self) -> frozenset[int]:
        """The layers that attend to the keys which an earlier layer's indexer picked."""
        return frozenset()

    def has_own_indexer(self, layer: int) -> bool:
        """Whether a layer picks its keys itself."""
        return self.has_indexer and layer not in self.sharing_layers

    @property
    def latent_dim(self) -> int:
        """Elements of one cached MLA row."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Every token that ends a text."""
        if self.eos_token_id is None:
            return ()
        return (self.eos_token_id,) if isinstance(self.eos_token_id, int) else self.eos_token_id

    def is_dense(self, layer: int) -> bool:
        """Whether a layer has a plain SwiGLU block instead of experts."""
        return layer < self.first_k_dense_replace

    def mla_shape(self) -> MLAShape:
        """Sizes of the attention layers."""
        scale = (self.qk_nope_head_dim + self.qk_rope_head_dim) ** -0.5
        return MLAShape(
            hidden_size=self.hidden_size,
            num_attention_heads=self.num_attention_heads,
            q_lora_rank=self.q_lora_rank,
            kv_lora_rank=self.kv_lora_rank,
            qk_nope_head_dim=self.qk_nope_head_dim,
            qk_rope_head_dim=self.qk_rope_head_dim,
            v_head_dim=self.v_head_dim,
            rms_norm_eps=LATENT_NORM_EPS,
            attention_bias=self.attention_bias,
            rope_interleave=self.rope_interleave,
            softmax_scale=scale * (self.yarn.softmax_scale if self.yarn else 1.0),
        )


class DeepseekV32Config(LatentMoEConfig):
    """DeepSeek-V3.2, and DeepSeek-V3, whose ``index_*`` are None."""

    model_type: Literal["deepseek_v3", "deepseek_v32"]

    @classmethod
    def fields_of(cls, raw: Mapping[str, object]) -> dict[str, object]:
        """See :meth:`LatentMoEConfig.fields_of`."""
        fields = {**raw, "first_k_dense_replace": _num_dense_layers(raw)}
        if raw.get("model_type") == "deepseek_v3":
            for name in ("index_n_heads", "index_head_dim", "index_topk"):
                fields.pop(name, None)
        return fields

    @model_validator(mode="after")
    def _indexer_is_whole(self) -> Self:
        if self.model_type == "deepseek_v32":
            if None in (self.index_n_heads, self.index_head_dim, self.index_topk):
                raise ValueError("deepseek_v32 needs index_n_heads, index_head_dim and index_topk")
            if self.q_lora_rank is None:
                raise ValueError("the indexer reads the latent query: q_lora_rank must be set")
        return self


def _num_dense_layers(raw: Mapping[str, object]) -> object:
    """``first_k_dense_replace``, or the same from transformers 5's ``mlp_layer_types``."""
    kinds = raw.get("mlp_layer_types")
    if not isinstance(kinds, list):
        return raw.get("first_k_dense_replace", 0)
    num_dense, num_layers = sum(kind == "dense" for kind in kinds), raw.get("num_hidden_layers")
    if (
        kinds != ["dense"] * num_dense + ["sparse"] * (len(kinds) - num_dense)
        or len(kinds) != num_layers
    ):
        raise ModelConfigError(
            f"mlp_layer_types {kinds}",
            expected=f'{num_layers} layers, "dense" ones first, then "sparse" ones',
        )
    return num_dense


def _rope_fields(raw: Mapping[str, object]) -> dict[str, object]:
    """``rope_theta`` and ``yarn`` from either spelling."""
    scaling = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(scaling, dict):
        raise ModelConfigError(f"rope_scaling is {scaling!r}", expected="a table")
    theta = scaling.get("rope_theta", raw.get("rope_theta", 10000.0))
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return {"rope_theta": theta, "yarn": None}
    if kind != "yarn":
        raise ModelConfigError(f"rope_scaling type {kind!r}", expected='"default" or "yarn"')
    if scaling.get("partial_rotary_factor", 1.0) != 1.0:
        raise ModelConfigError(
            f"partial_rotary_factor {scaling['partial_rotary_factor']!r} beside YaRN",
            expected="none: qk_rope_head_dim says what is rotated",
        )
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
