"""The losses of training: next token, indexer; each computed a block of rows at a time.

Shape suffixes: T tokens, H hidden, V vocabulary, L queries, K keys.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

ROWS: Final = 256  # logits of 256 tokens over 4096 entries stay in the cache: 4 MB in float32


class LinearCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of `hidden @ weight.T` against targets, gradients taken on the way.

    The logits of all tokens never exist at once, nor are they computed again for the backward
    pass. Products run in bfloat16, softmax and sums in float32.
    """

    @staticmethod
    def forward(ctx: Any, hidden_TH: Tensor, weight_VH: Tensor, targets_T: Tensor) -> Tensor:
        """Compute the loss and, row block by row block, both gradients of its sum."""
        weight = weight_VH.detach().bfloat16()
        hidden = hidden_TH.detach().bfloat16()
        hidden_grad = torch.empty_like(hidden)
        weight_grad = torch.zeros_like(weight_VH)
        half = torch.empty(ROWS, len(weight), dtype=torch.bfloat16)
        full = torch.empty(ROWS, len(weight))
        loss = torch.zeros(())
        for first in range(0, len(hidden), ROWS):
            rows = slice(first, first + ROWS)
            index = targets_T[rows, None]
            logits, grad = half[: len(index)], full[: len(index)]
            grad.copy_(torch.mm(hidden[rows], weight.T, out=logits))
            log_total = grad.logsumexp(dim=-1, keepdim=True)
            loss += (log_total - grad.gather(1, index)).sum()
            if not any(ctx.needs_input_grad):
                continue
            grad.sub_(log_total).exp_()
            grad.scatter_add_(1, index, torch.full_like(log_total, -1.0))
            logits.copy_(grad)
            torch.mm(logits, weight, out=hidden_grad[rows])
            weight_grad += logits.T @ hidden[rows]
        ctx.save_for_backward(hidden_grad, weight_grad)
        ctx.hidden_dtype = hidden_TH.dtype
        return loss / len(hidden)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        """Scale the gradients that the forward pass left."""
        hidden_grad, weight_grad = ctx.saved_tensors
        scale = grads[0] / len(hidden_grad)
        return (hidden_grad.float() * scale).to(ctx.hidden_dtype), weight_grad * scale, None


def linear_cross_entropy(hidden_TH: Tensor, weight_VH: Tensor, targets_T: Tensor) -> Tensor:
    """Return the mean cross-entropy (nats, float32 scalar) of predicting `targets_T`."""
    loss: Tensor = LinearCrossEntropy.apply(hidden_TH, weight_VH, targets_T)  # type: ignore[no-untyped-call]
    return loss
