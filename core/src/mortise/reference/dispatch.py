"""Dispatch decisions and the exchange within one process, in plain torch."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from mortise.formats.arrangement import (
    arrange_choices,
    arrange_rows,
    in_layout,
    rows_of_choices,
    sum_choices,
)
from mortise.formats.outgoing import (
    check_capacity,
    check_expert_rows,
    outgoing_rows,
    routing_weights_of_experts,
)
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

if TYPE_CHECKING:
    import torch

    from mortise.formats.arrangement import Arrangement

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
    return LocalDispatcher(
        request.num_experts,
        layer=request.layer,
        max_tokens_per_rank=request.max_tokens_per_rank or None,
    )


@dataclass(frozen=True, slots=True)
class LocalHandle:
    """Which row each choice ``[T, K]`` has, and its routing weight."""

    arrangement: Arrangement
    routing_weights: torch.Tensor
    hidden_size: int


class LocalDispatcher:
    """Groups the rows of one process by expert and sums them back in the order of the choices.

    The sum over a token's K choices runs in float32 and in the router's order, so it does not
    depend on which expert answered first. Every dispatch format is served: rows are quantised
    before they are arranged, as an exchange between processes does it.

    Args:
        num_experts: E; all of them are local.
        layer: named in errors.
        max_tokens_per_rank: most tokens of a low-latency dispatch, which sizes masked rows; None
            is as many as come.
        poison: fill undefined rows with what is not a number, to find who reads them.
    """

    __slots__ = ("layer", "max_tokens_per_rank", "num_experts", "poison")

    def __init__(
        self,
        num_experts: int,
        *,
        layer: str = "(unnamed)",
        max_tokens_per_rank: int | None = None,
        poison: bool = False,
    ) -> None:
        self.num_experts = num_experts
        self.layer = layer
        self.max_tokens_per_rank = max_tokens_per_rank
        self.poison = poison

    def dispatch(
        self, hidden_TH: torch.Tensor, routing: Routing, format: DispatchFormat
    ) -> tuple[DispatchedTokens, LocalHandle]:
        """Quantise, sort the choices by expert, drop -1.

        Counts are known on the host in the normal mode, and stay on the device in the low-latency
        one. Masked and low-latency rows hold one row where a token names an expert twice.

        Raises:
            ContractError: unquantised rows of another dtype than the format's.
            CapacityError: more tokens than a low-latency dispatch was made for.
        """
        rows, scales = outgoing_rows(hidden_TH, format, self.layer)
        arrangement = arrange_choices(
            routing.topk_ids,
            self.num_experts,
            format,
            capacity=self._capacity(hidden_TH.shape[0], format),
        )
        arranged = [
            in_layout(
                arrange_rows(one, arrangement, poison=self.poison),
                format.row_layout,
                self.num_experts,
            )
            for one in (rows, scales)
            if one is not None
        ]
        tokens = DispatchedTokens(
            rows=arranged[0],
            scales=arranged[1] if scales is not None else None,
            group_list=arrangement.counts,
            group_list_kind=GroupListKind.COUNTS,
            group_counts=arrangement.group_counts,
            format=format,
        )
        handle = LocalHandle(
            arrangement=arrangement,
            routing_weights=routing_weights_of_experts(routing),
            hidden_size=hidden_TH.shape[1],
        )
        return tokens, handle

    def _capacity(self, num_tokens: int, format: DispatchFormat) -> int | None:
        """Most tokens that one expert may get, where that sizes the rows."""
        if format.mode is DispatchMode.NORMAL:
            return num_tokens if format.row_layout is RowLayout.MASKED else None
        if self.max_tokens_per_rank is None:
            return num_tokens
        check_capacity(num_tokens, self.max_tokens_per_rank, self.layer)
        return self.max_tokens_per_rank

    def combine(self, rows_RH: torch.Tensor, handle: DispatchHandle) -> torch.Tensor:
        """Take each choice's row and the weighted sum over K.

        Raises:
            ContractError: fewer rows than were dispatched, or not a float row for each.
        """
        assert isinstance(handle, LocalHandle)
        check_expert_rows(rows_RH, handle.arrangement.num_rows, handle.hidden_size, self.layer)
        flat_RH = rows_RH.flatten(0, -2)
        chosen_TKH = rows_of_choices(flat_RH, handle.arrangement)
        return sum_choices(chosen_TKH, handle.routing_weights)
