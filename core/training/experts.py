"""The hooks that an MoE layer needs while it learns: the reference's meaning, with lean gradients.

The reference backend is differentiable, but its indexing sends gradients the slow way round. Here
rows go to the experts and back by permutations, and the experts' gradients are written once.

Shape suffixes: T tokens, K choices of a token, R = T * K rows, E experts, H hidden, I intermediate.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mortise.backends.load import load_backend
from mortise.spec.dispatch import DispatchedTokens, GroupListKind
from mortise.spec.roles import ModelRole

if TYPE_CHECKING:
    from mortise.backends.ops import Ops
    from mortise.spec.dispatch import (
        DispatchFormat,
        DispatchHandle,
        Routing,
        TokenDispatcherRequest,
    )
    from mortise.spec.experts import ExpertWeights


@dataclass(frozen=True, slots=True)
class Permutation:
    """`order_R` sorts the flattened choices by expert, `inverse_R` undoes it."""

    order_R: Tensor
    inverse_R: Tensor
    weights_TK: Tensor


class _Send(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_TH: Tensor, order_R: Tensor, inverse_R: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_R)
        ctx.num_tokens = len(hidden_TH)
        return hidden_TH.index_select(0, order_R // (len(order_R) // len(hidden_TH)))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (inverse_R,) = ctx.saved_tensors
        rows = grads[0].index_select(0, inverse_R)
        grad = rows.unflatten(0, (ctx.num_tokens, -1)).sum(dim=1, dtype=torch.float32)
        return grad.to(rows.dtype), None, None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows_RH: Tensor, weights_TK: Tensor, order_R: Tensor, inverse_R: Tensor
    ) -> Tensor:
        chosen_TKH = rows_RH.index_select(0, inverse_R).unflatten(0, weights_TK.shape)
        ctx.save_for_backward(chosen_TKH, weights_TK, order_R)
        weights = weights_TK.to(rows_RH.dtype)
        return torch.bmm(weights[:, None], chosen_TKH).squeeze(1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        chosen_TKH, weights_TK, order_R = ctx.saved_tensors
        grad_TH = grads[0].to(chosen_TKH.dtype)
        weights_grad = torch.bmm(chosen_TKH, grad_TH[:, :, None]).squeeze(2)
        num_choices = weights_TK.shape[1]
        rows_grad = grad_TH.index_select(0, order_R // num_choices)
        rows_grad *= weights_TK.flatten()[order_R, None].to(rows_grad.dtype)
        return rows_grad, weights_grad.to(weights_TK.dtype), None, None


class PermutingDispatcher:
    """Groups rows by expert within one process; rows travel in the experts' compute dtype."""

    def __init__(self, num_experts: int, compute_dtype: torch.dtype) -> None:
        self.num_experts = num_experts
        self.compute_dtype = compute_dtype

    def dispatch(
        self, hidden_TH: Tensor, routing: Routing, format: DispatchFormat
    ) -> tuple[DispatchedTokens, Permutation]:
        """Send each token's row to each of its experts."""
        ids_R = routing.topk_ids.flatten()
        order_R = ids_R.argsort(stable=True)
        inverse_R = torch.empty_like(order_R)
        inverse_R[order_R] = torch.arange(len(order_R), device=order_R.device)
        counts_E = ids_R.bincount(minlength=self.num_experts)
        half_TH = hidden_TH.to(self.compute_dtype)
        rows_RH: Tensor = _Send.apply(half_TH, order_R, inverse_R)  # type: ignore[no-untyped-call]
        tokens = DispatchedTokens(
            rows=rows_RH,
            scales=None,
            group_list=counts_E,
            group_list_kind=GroupListKind.COUNTS,
            group_counts=tuple(counts_E.tolist()),
            format=format,
        )
        return tokens, Permutation(order_R, inverse_R, routing.topk_weights)

    def combine(self, rows_RH: Tensor, handle: DispatchHandle) -> Tensor:
        """Return each token's weighted sum of its experts' rows."""
        assert isinstance(handle, Permutation)
        combined: Tensor = _Collect.apply(  # type: ignore[no-untyped-call]
            rows_RH, handle.weights_TK, handle.order_R, handle.inverse_R
        )
        return combined


class _GroupedSwiGLU(torch.autograd.Function):
    """`down(silu(gate(x)) * up(x))` for each group of rows, products in bfloat16."""

    @staticmethod
    def forward(
        ctx: Any, rows_RH: Tensor, w13: Tensor, w2: Tensor, counts: tuple[int, ...], dtype: Any
    ) -> Tensor:
        rows, w13_half, w2_half = rows_RH.to(dtype), w13.to(dtype), w2.to(dtype)
        gate_up = torch.empty(len(rows), w13.shape[1], dtype=dtype)
        output = torch.empty(len(rows), w2.shape[1], dtype=dtype)
        for expert, group in groups(counts):
            torch.mm(rows[group], w13_half[expert].T, out=gate_up[group])
            gate, up = gate_up[group].chunk(2, dim=-1)
            torch.mm(F.silu(gate) * up, w2_half[expert].T, out=output[group])
        ctx.save_for_backward(rows, gate_up, w13_half, w2_half)
        ctx.counts = counts
        ctx.dtypes = rows_RH.dtype, w13.dtype, w2.dtype
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        rows, gate_up, w13, w2 = ctx.saved_tensors
        grad = grads[0].to(rows.dtype)
        rows_grad = torch.empty_like(rows)
        w13_grad, w2_grad = torch.zeros_like(w13), torch.zeros_like(w2)
        for expert, group in groups(ctx.counts):
            gate, up = gate_up[group].chunk(2, dim=-1)
            sigmoid = gate.sigmoid()
            silu = gate * sigmoid
            torch.mm(grad[group].T, silu * up, out=w2_grad[expert])
            inner = grad[group] @ w2[expert]
            gate_grad = inner * up * (sigmoid + silu * (1 - sigmoid))
            both = torch.cat([gate_grad, inner * silu], dim=-1)
            torch.mm(both.T, rows[group], out=w13_grad[expert])
            torch.mm(both, w13[expert], out=rows_grad[group])
        rows_dtype, w13_dtype, w2_dtype = ctx.dtypes
        return (
            rows_grad.to(rows_dtype),
            w13_grad.to(w13_dtype),
            w2_grad.to(w2_dtype),
            None,
            None,
        )


def groups(counts: tuple[int, ...]) -> list[tuple[int, slice]]:
    """Return (expert, its slice of the rows) of each expert that has rows."""
    found, start = [], 0
    for expert, count in enumerate(counts):
        if count:
            found.append((expert, slice(start, start + count)))
        start += count
    return found


def training_ops(compute_dtype: torch.dtype) -> Ops:
    """Return the reference's hooks with lean gradients for the two that training leans on."""

    def create_token_dispatcher(request: TokenDispatcherRequest) -> PermutingDispatcher:
        return PermutingDispatcher(request.num_experts, compute_dtype)

    def quantized_moe_apply(
        tokens: DispatchedTokens, experts: ExpertWeights, out_dtype: torch.dtype
    ) -> Tensor:
        assert tokens.group_counts is not None
        weights = experts.w13.weight, experts.w2.weight
        rows_RH: Tensor = _GroupedSwiGLU.apply(  # type: ignore[no-untyped-call]
            tokens.rows, *weights, tokens.group_counts, compute_dtype
        )
        # Automatic mixed precision keeps activations in the compute dtype, whatever was asked for.
        return rows_RH if torch.is_autocast_enabled("cpu") else rows_RH.to(out_dtype)

    return replace(
        load_backend("reference", role=ModelRole.MAIN).ops,
        create_token_dispatcher=create_token_dispatcher,
        quantized_moe_apply=quantized_moe_apply,
    )
