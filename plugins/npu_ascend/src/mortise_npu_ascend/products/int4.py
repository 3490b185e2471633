"""int4 weights with int4 rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch

from mortise.formats.integer import unpack_int4
from mortise_npu_ascend.layout import columns_last, int4_words, scale_words
from mortise_npu_ascend.products.base import Kind, Product, Rows, grouped_matmul
from mortise_npu_ascend.products.fp16_range import shrinking

if TYPE_CHECKING:
    from mortise.plugin import StoredWeight
    from mortise_npu_ascend.groups import Groups
    from mortise_npu_ascend.vendor import Vendor

_LARGEST_OF_ROW: Final = 7


@dataclass(frozen=True, slots=True)
class Int4Product(Product):
    """W4A4.

    Args:
        torch_npu: the operators.
        weight: int32 words along N, ``[E_l, K, N/8]``.
        scale: int64, the bits of float32: ``[E_l, N]`` per channel, else ``[E_l, G, N]``.
        row_factor: of the rows' scales, a power of two that undoes the shrinking of the others.
    """

    torch_npu: Any
    weight: torch.Tensor
    scale: torch.Tensor
    row_factor: float

    @classmethod
    def of(cls, vendor: Vendor, stored: StoredWeight) -> Int4Product:
        """Lay a stored weight ``[E_l, N, K/8]`` out."""
        assert stored.scale is not None
        values_ENK = unpack_int4(stored.weight)
        exponent = shrinking(values_ENK, stored.scale, _LARGEST_OF_ROW)
        scale_ENG = stored.scale.float() * 2.0**-exponent
        return cls(
            torch_npu=vendor.torch_npu,
            weight=int4_words(vendor.torch_npu, values_ENK, tiles=vendor.tiles),
            scale=scale_words(columns_last(scale_ENG)),
            row_factor=2.0**exponent,
        )

    @property
    def takes(self) -> Kind:
        """int4 rows."""
        return Kind.INT4

    def multiply(self, rows: Rows, groups: Groups) -> torch.Tensor:
        """Sum groups of columns in fp16, then scale in float32 and round to bfloat16."""
        assert rows.scales is not None
        return grouped_matmul(
            self.torch_npu,
            rows.values,
            self.weight,
            groups,
            torch.bfloat16,
            scale=self.scale,
            per_token_scale=rows.scales * self.row_factor if self.row_factor > 1 else rows.scales,
        )
