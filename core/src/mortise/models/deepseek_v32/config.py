"""What ``config.json`` says of a DeepSeek-V3 or DeepSeek-V3.2 model, or a relative, checked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal, Self

from pydantic import PositiveInt, model_validator

from mortise.errors import ModelConfigError
from mortise.layers.mla import MLAShape
from mortise.models.decoder_config import RoutedDecoderConfig, rotary_fields, rotary_table

if TYPE_CHECKING:
    from collections.abc import Mapping


LATENT_NORM_EPS: Final = 1e-6
"""Epsilon of the norms of both latents, whatever ``rms_norm_eps`` says.

So in transformers' models and in the authors' own code (``inference/model.py``). Engines that read
``rms_norm_eps`` here compute the same only where it is 1e-6, as DeepSeek published it.
"""


class LatentMoEConfig(RoutedDecoderConfig):
    """The fields that latent attention is built from, in every family that has it.

    ``index_*`` are None where attention has no indexer.
    """

    moe_layer_freq: Literal[1] = 1

    q_lora_rank: PositiveInt | None = None
    kv_lora_rank: PositiveInt
    qk_nope_head_dim: PositiveInt
    qk_rope_head_dim: PositiveInt
    v_head_dim: PositiveInt
    rope_interleave: bool = True

    index_n_heads: PositiveInt | None = None
    index_head_dim: PositiveInt | None = None
    index_topk: PositiveInt | None = None
    indexer_rope_interleave: bool = False

    @classmethod
    def from_dict(cls, raw: Mapping[str, object]) -> Self:
        """See :meth:`~mortise.models.decoder_config.RoutedDecoderConfig.from_dict`."""
        factor = rotary_table(raw).get("partial_rotary_factor", 1.0)
        if factor != 1.0 and rotary_fields(raw)["yarn"] is not None:
            raise ModelConfigError(
                f"partial_rotary_factor {factor!r} beside YaRN",
                expected="none: qk_rope_head_dim says what is rotated",
            )
        return super().from_dict(raw)

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
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
        """See :meth:`~mortise.models.decoder_config.RoutedDecoderConfig.fields_of`."""
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
