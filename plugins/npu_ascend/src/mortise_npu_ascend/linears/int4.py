"""int4 weights with int4 rows, a scale for each output row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from mortise.formats.integer import unpack_int4
from mortise_npu_ascend.layout import columns_last, int4_words
from mortise_npu_ascend.linears.base import LinearProduct
from mortise_npu_ascend.products.base import Kind, quantise

if TYPE_CHECKING:
    from mortise.plugin import StoredWeight
    from mortise_npu_ascend.vendor import Vendor


@dataclass(frozen=True, slots=True)
class Int4Linear(LinearProduct):
    """W4A4 per channel.

    Args:
        torch_npu: the operators.
        weight: int32 words along N, ``[K, N/8]``.
        scale: float32 ``[N]``.
        bias: float32 ``[N]``, or None.
    """

    torch_npu: Any
    weight: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor | None

    @classmethod
    def of(cls, vendor: Vendor, stored: StoredWeight, bias: torch.Tensor | None) -> Int4Linear:
        """Lay a stored weight ``[N, K/8]`` out."""
        assert stored.scale is not None
        words_KN = int4_words(vendor.torch_npu, unpack_int4(stored.weight), tiles=False)
        return cls(vendor.torch_npu, words_KN, columns_last(stored.scale), bias)

    def multiply(self, rows_TK: torch.Tensor) -> torch.Tensor:
        """Exact sums, times both scales, plus the bias in float32; rounded once."""
        rows = quantise(self.torch_npu, rows_TK, Kind.INT4)
        product: torch.Tensor = self.torch_npu.npu_quant_matmul(
            rows.values,
            self.weight,
            self.scale,
            pertoken_scale=rows.scales,
            bias=self.bias,
            output_dtype=torch.bfloat16,
        )
        return product
