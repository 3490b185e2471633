"""Dispatch decisions and the exchange within one process, in plain torch."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, cast

import torch

from mortise.spec.authority import DispatchPolicy, Exact, decide_by_authority
from mortise.spec.dispatch import (
    DispatchDecision,
    DispatchDtype,
    DispatchedTokens,
    DispatchFormat,
    DispatchHandle,
    DispatchMode,
    DispatchRequest,
    GroupListKind,
    Routing,
    RowLayout,
    TokenDispatcher,
    TokenDispatcherRequest,
)
from mortise.spec.hooks import NOT_SUPPORTED, NotSupported

POLICY: Final = DispatchPolicy(
    device="the reference",
    default=None,
    # Plain torch can send whatever a layer's experts consume.
    actions=MappingProxyType(dict.fromkeys(DispatchDtype, Exact())),
    row_layouts=MappingProxyType(
        {DispatchMode.NORMAL: RowLayout.GROUPED, DispatchMode.LOW_LATENCY: RowLayout.MASKED}
    ),
)


def resolve_dispatch_dtype(request: DispatchRequest) -> DispatchDecision:
    """Keep to the order of authority; when nobody asks, rows travel in the compute dtype."""
    return decide_by_authority(request, POLICY)


def create_token_dispatcher(request: TokenDispatcherRequest) -> TokenDispatcher | NotSupported:
    """Serve one process; several are the portable exchange's work."""
    if request.world_size != 1:
        return NOT_SUPPORTED
    return LocalDispatcher(request.num_experts)


@dataclass(frozen=True, slots=True)
class LocalHandle:
    """Where each dispatched row came from: position in the flattened ``[T * K]`` choices."""

    order_R: torch.Tensor
    topk_weights_TK: torch.Tensor


class LocalDispatcher:
    """Groups the rows of one process by expert and sums them back in the order of the choices.

    The sum over a token's K choices runs in float32 and in the router's order, so it does not
    depend on which expert answered first.
    """

    __slots__ = ("num_experts",)

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts

    def dispatch(
        self, hidden_TH: torch.Tensor, routing: Routing, format: DispatchFormat
    ) -> tuple[DispatchedTokens, LocalHandle]:
        """Sort the choices by expert, dropping -1; counts per expert are known on the host."""
        ids = routing.topk_ids.flatten()
        # -1 (no expert) sorts last, behind every group, and is cut off there.
        ids = torch.where(ids < 0, self.num_experts, ids)
        order = ids.argsort(stable=True)
        counts = ids.bincount(minlength=self.num_experts + 1)[: self.num_experts]
        group_counts = tuple(cast("list[int]", counts.tolist()))
        order = order[: sum(group_counts)]
        tokens = DispatchedTokens(
            rows=hidden_TH.index_select(0, order // routing.topk_ids.shape[1]),
            scales=None,
            group_list=counts,
            group_list_kind=GroupListKind.COUNTS,
            group_counts=group_counts,
            format=format,
        )
        return tokens, LocalHandle(order, routing.topk_weights)

    def combine(self, rows_RH: torch.Tensor, handle: DispatchHandle) -> torch.Tensor:
        """Put rows back in the order of the choices and take the weighted sum over K."""
        assert isinstance(handle, LocalHandle)
        weights_TK = handle.topk_weights_TK
        num_tokens, num_choices = weights_TK.shape
        num_rows, hidden_size = handle.order_R.shape[0], rows_RH.shape[1]
        # What no expert answered for stays zero.
        chosen = rows_RH.new_zeros(num_tokens * num_choices, hidden_size, dtype=torch.float32)
        chosen.index_copy_(0, handle.order_R, rows_RH[:num_rows].float())
        chosen_TKH = chosen.view(num_tokens, num_choices, hidden_size)
        summed = torch.bmm(weights_TK.float().unsqueeze(1), chosen_TKH).squeeze(1)
        return summed.to(rows_RH.dtype)
