"""What ``config.json`` says of a GLM-4.5, 4.6 or 4.7 model, checked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from mortise.layers.grouped_attention import GroupedShape
from mortise.models.decoder_config import RoutedDecoderConfig, rotary_table

if TYPE_CHECKING:
    from collections.abc import Mapping


class Glm4MoeConfig(RoutedDecoderConfig):
    """The fields of ``Glm4MoeConfig`` in transformers 5.23, with its defaults.

    ``partial_rotary_factor`` is read from ``rope_parameters`` or from beside it, 0.5 where neither
    has it. ``head_dim`` is ``hidden_size / num_attention_heads`` where it is not given.
    """

    model_type: Literal["glm4_moe"]
    rms_norm_eps: float = Field(default=1e-5, ge=0)
    first_k_dense_replace: int = Field(default=1, ge=0)

    num_key_value_heads: PositiveInt
    head_dim: PositiveInt
    use_qk_norm: bool = False
    partial_rotary_factor: float = Field(default=0.5, gt=0, le=1)

    @classmethod
    def fields_of(cls, raw: Mapping[str, object]) -> dict[str, object]:
        """See :meth:`~mortise.models.decoder_config.RoutedDecoderConfig.fields_of`."""
        fields = dict(raw)
        factor = rotary_table(raw).get("partial_rotary_factor")
        if factor is not None:
            fields["partial_rotary_factor"] = factor
        hidden_size, heads = raw.get("hidden_size"), raw.get("num_attention_heads")
        if raw.get("head_dim") is None and isinstance(hidden_size, int) and isinstance(heads, int):
            fields["head_dim"] = hidden_size // heads if heads else 0
        return fields

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.rotary_dim == 0 or self.rotary_dim % 2:
            raise ValueError(
                f"partial_rotary_factor {self.partial_rotary_factor} of head_dim {self.head_dim} "
                f"rotates {self.rotary_dim} dimensions, which are no pairs"
            )
        return self

    @property
    def rotary_dim(self) -> int:
        """Leading dimensions of a head that are rotated."""
        return int(self.head_dim * self.partial_rotary_factor)

    def attention_shape(self) -> GroupedShape:
        """Sizes of the attention layers."""
        return GroupedShape(
            hidden_size=self.hidden_size,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=self.num_key_value_heads,
            head_dim=self.head_dim,
            attention_bias=self.attention_bias,
        )
