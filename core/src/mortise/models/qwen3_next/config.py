"""What ``config.json`` says of a Qwen3-Next or Qwen3.5 MoE model, checked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    model_validator,
)

from mortise.errors import ModelConfigError
from mortise.layers.grouped_attention import GroupedShape
from mortise.layers.rotary import YarnScaling
from mortise.models.decoder_config import rotary_fields, rotary_table
from mortise.spec.qkv import QKVLayout, QKVShape

if TYPE_CHECKING:
    from collections.abc import Mapping

LayerType = Literal["linear_attention", "full_attention"]

ONLY_QWEN3_NEXT = ("decoder_sparse_step", "mlp_only_layers", "norm_topk_prob")
"""Fields that Qwen3.5 has not: all its layers have experts, whose weights sum to one."""


class Qwen3NextConfig(BaseModel):
    """The fields the model is built from; names as published, unknown ones ignored.

    Both spellings of the rotary fields are read: the hub's ``rope_theta``, ``rope_scaling`` and
    ``partial_rotary_factor``, and transformers 5's ``rope_parameters``. The three positions that
    Qwen3.5 has of a token (``mrope_section``) are one and the same in a text. ``qwen3_5_moe`` is a
    model of texts and pictures, whose ``text_config`` holds the fields of ``qwen3_5_moe_text``.
    Qwen3-Next says nothing of its multi-token prediction layer, and has one.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    model_type: Literal["qwen3_next", "qwen3_5_moe", "qwen3_5_moe_text"]
    vocab_size: PositiveInt
    hidden_size: PositiveInt
    num_hidden_layers: PositiveInt
    max_position_embeddings: PositiveInt
    rms_norm_eps: float = Field(default=1e-6, ge=0)
    tie_word_embeddings: bool = False
    eos_token_id: int | tuple[int, ...] | None = None
    torch_dtype: str | None = None
    hidden_act: Literal["silu"] = "silu"

    num_attention_heads: PositiveInt
    num_key_value_heads: PositiveInt
    head_dim: PositiveInt
    attention_bias: bool = False
    partial_rotary_factor: float = Field(default=0.25, gt=0, le=1)
    rope_theta: float = Field(default=10000.0, gt=0)
    yarn: YarnScaling | None = None

    layer_types: tuple[LayerType, ...]
    linear_num_key_heads: PositiveInt
    linear_num_value_heads: PositiveInt
    linear_key_head_dim: PositiveInt
    linear_value_head_dim: PositiveInt
    linear_conv_kernel_dim: PositiveInt = 4

    intermediate_size: PositiveInt = 1
    num_experts: PositiveInt
    num_experts_per_tok: PositiveInt
    moe_intermediate_size: PositiveInt
    shared_expert_intermediate_size: PositiveInt
    norm_topk_prob: bool = True
    decoder_sparse_step: PositiveInt = 1
    mlp_only_layers: tuple[int, ...] = ()

    mtp_num_hidden_layers: NonNegativeInt = 1
    mtp_use_dedicated_embeddings: bool = False

    @classmethod
    def from_dict(cls, raw: Mapping[str, object]) -> Self:
        """Read a parsed ``config.json``.

        Raises:
            ModelConfigError: a field is missing, of the wrong type, or contradicts another.
        """
        raw = _of_texts(raw)
        fields = {**raw, **_rope_fields(raw)}
        fields.setdefault("torch_dtype", raw.get("dtype"))
        if raw.get("mlp_only_layers") is None or raw.get("model_type") != "qwen3_next":
            fields.pop("mlp_only_layers", None)
        if raw.get("model_type") != "qwen3_next":
            fields = {name: value for name, value in fields.items() if name not in ONLY_QWEN3_NEXT}
        if raw.get("layer_types") is None:
            fields["layer_types"] = _layer_types(raw)
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

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for few, many in (
            ("num_key_value_heads", "num_attention_heads"),
            ("linear_num_key_heads", "linear_num_value_heads"),
        ):
            if getattr(self, many) % getattr(self, few):
                raise ValueError(
                    f"{many} {getattr(self, many)} is not a multiple of {few} {getattr(self, few)}"
                )
        if len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"layer_types has {len(self.layer_types)} entries for "
                f"{self.num_hidden_layers} layers"
            )
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"num_experts_per_tok {self.num_experts_per_tok} is more than the "
                f"{self.num_experts} experts"
            )
        if self.rotary_dim % 2 or not self.rotary_dim:
            raise ValueError(
                f"partial_rotary_factor {self.partial_rotary_factor} rotates {self.rotary_dim} of "
                f"{self.head_dim} dimensions, which are no pairs"
            )
        if self.yarn and min(self.yarn.factor, self.yarn.original_max_position_embeddings) <= 0:
            raise ValueError("factor and original_max_position_embeddings of YaRN must be positive")
        dense = [index for index in range(self.num_hidden_layers) if self.is_dense(index)]
        if dense and "intermediate_size" not in self.model_fields_set:
            raise ValueError(f"layers {dense} have no experts: intermediate_size must be given")
        return self

    @property
    def decoder_name(self) -> str:
        """Dotted name in the checkpoint of what holds the embedding and the layers."""
        return "model.language_model" if self.model_type == "qwen3_5_moe" else "model"

    @property
    def rotary_dim(self) -> int:
        """Leading dimensions of a head that are rotated."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Every token that ends a text."""
        if self.eos_token_id is None:
            return ()
        return (self.eos_token_id,) if isinstance(self.eos_token_id, int) else self.eos_token_id

    @property
    def num_recurrent_layers(self) -> int:
        """Layers that are gated delta nets."""
        return sum(kind == "linear_attention" for kind in self.layer_types)

    def is_recurrent(self, layer: int) -> bool:
        """Whether a layer is a gated delta net instead of attention."""
        return self.layer_types[layer] == "linear_attention"

    def place(self, layer: int) -> int:
        """Which of the layers of its kind a layer is, counted from 0."""
        return self.layer_types[:layer].count(self.layer_types[layer])

    def is_dense(self, layer: int) -> bool:
        """Whether a layer has a plain SwiGLU block instead of experts."""
        return layer in self.mlp_only_layers or bool((layer + 1) % self.decoder_sparse_step)

    def attention_shape(self) -> GroupedShape:
        """Sizes of the attention layers."""
        return GroupedShape(
            hidden_size=self.hidden_size,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=self.num_key_value_heads,
            head_dim=self.head_dim,
            attention_bias=self.attention_bias,
            output_bias=self.attention_bias,
            output_gate=True,
        )

    def qkv_shape(self) -> QKVShape:
        """Sizes of the gated delta nets, and how the checkpoint stores their projections."""
        is_next = self.model_type == "qwen3_next"
        return QKVShape(
            num_key_heads=self.linear_num_key_heads,
            num_value_heads=self.linear_num_value_heads,
            key_head_dim=self.linear_key_head_dim,
            value_head_dim=self.linear_value_head_dim,
            layout=QKVLayout.INTERLEAVED if is_next else QKVLayout.CONTIGUOUS,
        )


def _of_texts(raw: Mapping[str, object]) -> Mapping[str, object]:
    """The fields of the text model, beside those that transformers reads of the whole."""
    if raw.get("model_type") != "qwen3_5_moe":
        return raw
    texts = raw.get("text_config")
    if not isinstance(texts, dict):
        raise ModelConfigError(f"text_config is {texts!r}", expected="a table")
    whole = ("model_type", "tie_word_embeddings", "torch_dtype", "dtype", "eos_token_id")
    return {**texts, **{name: raw[name] for name in whole if raw.get(name) is not None}}


def _layer_types(raw: Mapping[str, object]) -> tuple[str, ...]:
    """Every so many layers one of attention, where they are not listed."""
    interval, count = raw.get("full_attention_interval", 4), raw.get("num_hidden_layers")
    if not isinstance(interval, int) or interval < 1:
        raise ModelConfigError(
            f"full_attention_interval is {interval!r}", expected="a positive integer"
        )
    return tuple(
        "linear_attention" if (layer + 1) % interval else "full_attention"
        for layer in range(count if isinstance(count, int) else 0)
    )


def _rope_fields(raw: Mapping[str, object]) -> dict[str, object]:
    """``rope_theta``, ``yarn`` and ``partial_rotary_factor`` from either spelling."""
    fields = rotary_fields(raw)
    factor = rotary_table(raw).get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    return fields if factor is None else {**fields, "partial_rotary_factor": factor}
