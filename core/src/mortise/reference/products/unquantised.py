"""A product in the rows' own dtype: unquantised weights, and weights that alone are quantised."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from mortise.reference.products.base import Product


@dataclass(frozen=True, slots=True)
class UnquantisedProduct(Product):
    """FLOAT, W4A16, and NVFP4 without a scale for its input.

    Args:
        weight: ``[N, K]``; FLOAT as it is stored, other schemes dequantised to float32 and rounded
            to the dtype of the rows they meet.
    """

    weight: torch.Tensor

    def apply(self, rows_RK: torch.Tensor, bias_N: torch.Tensor | None = None) -> torch.Tensor:
        """Multiply in the rows' dtype, as torch does."""
        return F.linear(rows_RK, self.weight.to(rows_RK.dtype), bias_N)
