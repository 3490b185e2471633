"""Root mean square normalisation."""

from __future__ import annotations

import torch
from torch import nn


class RMSNorm(nn.Module):
    """``x / rms(x) * weight``, the mean taken in float32 (arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[..., size]`` to the same shape and dtype."""
        return nn.functional.rms_norm(hidden, self.weight.shape, self.weight, self.eps)


class ZeroCentredRMSNorm(nn.Module):
    """``x / rms(x) * (1 + weight)``, all of it in float32 (as in Gemma; Qwen3-Next, Qwen3.5).

    One is not added to the stored weight, which is near 0 and would lose its digits in bfloat16.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[..., size]`` to the same shape and dtype."""
        weight = 1.0 + self.weight.float()
        normed = nn.functional.rms_norm(hidden.float(), weight.shape, weight, self.eps)
        return normed.to(hidden.dtype)
