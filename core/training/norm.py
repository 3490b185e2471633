"""Root mean square normalisation with a backward pass written out: half the passes over memory.

Shape suffixes: R rows, H size of a row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class RMSNormFunction(torch.autograd.Function):
    """`x / rms(x) * weight` in float32; the result has the dtype of `x`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_H: Tensor, eps: float) -> Tensor:
        """Normalise rows [..., H]."""
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        inverse = norm.square_().mul_(1 / x.shape[-1]).add_(eps).rsqrt_()
        unit = x * inverse
        ctx.save_for_backward(unit, inverse, weight_H)
        ctx.dtype = x.dtype
        normalised: Tensor = (unit * weight_H).to(x.dtype)
        return normalised

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        """Project the gradient off each row, and sum the weight's over rows."""
        unit, inverse, weight_H = ctx.saved_tensors
        grad = grads[0].float()
        product = grad * unit
        weight_grad = product.flatten(0, -2).sum(dim=0)
        along = (product @ weight_H)[..., None] / unit.shape[-1]
        x_grad = (grad * weight_H).addcmul_(unit, along, value=-1).mul_(inverse)
        return x_grad.to(ctx.dtype), weight_grad, None


def rms_norm(x: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """Return the normalised rows of `x` [..., H], in its dtype."""
    output: Tensor = RMSNormFunction.apply(x, weight_H, eps)  # type: ignore[no-untyped-call]
    return output
