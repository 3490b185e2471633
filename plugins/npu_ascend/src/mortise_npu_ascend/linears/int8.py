"""int8 weights with int8 rows, each with its own scale."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from mortise_npu_ascend.layout import columns_last, in_tiles, transposed
from mortise_npu_ascend.linears.base import LinearProduct
from mortise_npu_ascend.products.base import Kind, quantise

if TYPE_CHECKING:
    from mortise.plugin import StoredWeight
    from mortise_npu_ascend.vendor import Vendor


@dataclass(frozen=True, slots=True)
class Int8Linear(LinearProduct):
    """W8A8, rows quantised one by one.

    Args:
        torch_npu: the operators.
        weight: int8 ``[K, N]``.
        scale: float32 ``[N]``.
        bias: float32 ``[N]``, or None.
    """

    torch_npu: Any
    weight: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor | None

    @classmethod
    def of(cls, vendor: Vendor, stored: StoredWeight, bias: torch.Tensor | None) -> Int8Linear:
        """Lay a stored weight ``[N, K]`` out."""
        assert stored.scale is not None
        weight_KN = in_tiles(vendor.torch_npu, transposed(stored.weight), wanted=vendor.tiles)
        return cls(vendor.torch_npu, weight_KN, columns_last(stored.scale), bias)

    def multiply(self, rows_TK: torch.Tensor) -> torch.Tensor:
        """Exact sums, times both scales, plus the bias in float32; rounded once."""
        rows = quantise(self.torch_npu, rows_TK, Kind.INT8)
        product: torch.Tensor = self.torch_npu.npu_quant_matmul(
            rows.values,
            self.weight,
            self.scale,
            pertoken_scale=rows.scales,
            bias=self.bias,
            output_dtype=torch.bfloat16,
        )
        return product
