"""The product of float8 rows with float8 weights in blocks, accumulated in two levels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from mortise.formats.fp8 import GROUP, quantise_fp8_rows, unpack_ue8m0
from mortise.reference.products.base import Product, QuantisedRows, add_bias, add_up

if TYPE_CHECKING:
    from mortise.spec.weights import ScaleFormat


@dataclass(frozen=True, slots=True)
class Fp8BlockProduct(Product):
    """FP8_BLOCK.

    Args:
        weight: the e4m3 values ``[N, K]`` held in float32.
        scale: float32 ``[C, N]``: of each block of 128 columns, the scale of every output row.
        scale_format: of the rows' scales.
    """

    weight: torch.Tensor
    scale: torch.Tensor
    scale_format: ScaleFormat

    def apply(self, rows_RK: torch.Tensor, bias_N: torch.Tensor | None = None) -> torch.Tensor:
        """Quantise rows per 128 columns, multiply, add the bias in float32."""
        return add_bias(self._multiply(*quantise_fp8_rows(rows_RK, self.scale_format)), bias_N)

    def apply_quantised(self, rows: QuantisedRows) -> torch.Tensor:
        """Multiply e4m3 rows with float32 scales, or with powers of two packed in int32."""
        scales = rows.scales
        if scales.dtype is torch.int32:
            scales = unpack_ue8m0(scales, self.scale.shape[0])
        return self._multiply(rows.values, scales)

    def _multiply(self, values_RK: torch.Tensor, scales_RC: torch.Tensor) -> torch.Tensor:
        """Sum a block of columns in float32, scale it, and sum the blocks in float32.

        The two levels are those of DeepSeek-V3 (arXiv 2412.19437, section 3.3.2).
        """
        blocks = zip(
            values_RK.float().split(GROUP, dim=1),
            self.weight.split(GROUP, dim=1),
            scales_RC.split(1, dim=1),
            self.scale,
            strict=True,
        )
        return add_up(
            F.linear(values, weight) * (row_scale * weight_scale)
            for values, weight, row_scale, weight_scale in blocks
        )
