"""Unquantised weights, multiplied in their own dtype."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mortise_npu_ascend.layout import fits_tiles, in_tiles
from mortise_npu_ascend.products.base import Kind, Product, Rows, grouped_matmul

if TYPE_CHECKING:
    import torch

    from mortise.plugin import StoredWeight
    from mortise_npu_ascend.groups import Groups
    from mortise_npu_ascend.vendor import Vendor


@dataclass(frozen=True, slots=True)
class FloatProduct(Product):
    """FLOAT.

    Args:
        torch_npu: the operators.
        weight: ``[E_l, K, N]``; bfloat16 in tiles where possible, else a view of the stored one.
    """

    torch_npu: Any
    weight: torch.Tensor

    @classmethod
    def of(cls, vendor: Vendor, stored: StoredWeight) -> FloatProduct:
        """Lay a stored weight ``[E_l, N, K]`` out; what has no tiles is not copied."""
        weight_EKN = stored.weight.detach().transpose(-1, -2)
        if vendor.tiles and fits_tiles(weight_EKN):
            weight_EKN = in_tiles(vendor.torch_npu, weight_EKN.contiguous(), wanted=True)
        return cls(vendor.torch_npu, weight_EKN)

    @property
    def takes(self) -> Kind:
        """Rows of the weight's dtype."""
        return Kind.PLAIN

    def multiply(self, rows: Rows, groups: Groups) -> torch.Tensor:
        """Accumulate in float32, round once."""
        return grouped_matmul(self.torch_npu, rows.values, self.weight, groups, rows.values.dtype)
