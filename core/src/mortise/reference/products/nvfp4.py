"""The product of float4 rows with float4 weights, their global scales applied to the sums."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from mortise.formats.nvfp4 import dequantise_nvfp4, quantise_nvfp4
from mortise.reference.products.base import Product, QuantisedRows, add_bias


@dataclass(frozen=True, slots=True)
class Nvfp4Product(Product):
    """NVFP4 with a global scale of the input.

    Args:
        weight: e2m1 values times their e4m3 block scales ``[N, K]``, exact in float32.
        global_scale: float32 ``[N]``: that of the part which each output row belongs to, so that
            gate and up keep different ones without loss.
        input_scale: float32 scalar, the global scale of unquantised rows.
    """

    weight: torch.Tensor
    global_scale: torch.Tensor
    input_scale: torch.Tensor

    def apply(self, rows_RK: torch.Tensor, bias_N: torch.Tensor | None = None) -> torch.Tensor:
        """Quantise rows in blocks of 16 columns, multiply, add the bias in float32."""
        packed, scales = quantise_nvfp4(rows_RK, self.input_scale)
        return add_bias(self._multiply(packed, scales, self.input_scale), bias_N)

    def apply_quantised(self, rows: QuantisedRows) -> torch.Tensor:
        """Multiply rows under the global scale that their format states."""
        assert rows.global_scale is not None
        global_scale = self.input_scale.new_tensor(rows.global_scale)
        return self._multiply(rows.values, rows.scales, global_scale)

    def _multiply(
        self, packed: torch.Tensor, scales: torch.Tensor, global_scale: torch.Tensor
    ) -> torch.Tensor:
        rows_RK = dequantise_nvfp4(packed, scales, 1.0)
        return F.linear(rows_RK, self.weight) * (global_scale * self.global_scale)
