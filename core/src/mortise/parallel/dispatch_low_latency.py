"""The portable exchange of fixed size: the same bytes every time, and no number on the host."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from mortise.errors import ContractError
from mortise.formats.arrangement import (
    arrange_choices,
    fill_rows,
    fixed_num_rows,
    in_layout,
    rows_in_slots,
    sum_choices,
    undefined_rows,
)
from mortise.formats.layout import TensorLayout
from mortise.formats.outgoing import (
    check_capacity,
    check_expert_rows,
    outgoing_rows,
    routing_weights_of_experts,
)
from mortise.formats.rows import row_tensors
from mortise.parallel.collectives import Exchange, start_exchange
from mortise.parallel.packets import pack, unpack
from mortise.spec.dispatch import (
    DispatchedTokens,
    DispatchFormat,
    DispatchHandle,
    DispatchMode,
    GroupListKind,
    Routing,
    TokenDispatcherRequest,
)
from mortise.spec.reasons import ReasonCode

if TYPE_CHECKING:
    from mortise.parallel.group import ExpertParallelGroup


@dataclass(slots=True, kw_only=True)
class LowLatencyHandle:
    """Where the experts' rows belong at home, and once they were received, where they are here.

    Args:
        rank_of_choice: int64 ``[T, K]``, the rank of each choice's expert; G where there is none.
        routing_weights: float32 ``[T, K]``.
        num_rows: rows of this rank's experts, used or not.
        slot_of_choice: int64 ``[G * capacity, K]``, the row of every choice that came from any
            rank, ``num_rows`` where there is none; None until the rows were received.
    """

    rank_of_choice: torch.Tensor
    routing_weights: torch.Tensor
    num_rows: int
    slot_of_choice: torch.Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """Rows that are under way and the memory they are going to.

    Args:
        exchange: the packets ``[G * capacity, B]``.
        layouts: what a packet holds: the row, its scales if any, the experts' numbers.
        buffers: ``[num_rows + 1, ...]`` for the rows and their scales.
        counts: int64 ``[E_l]``, to be filled in.
        format: what the rows are.
    """

    exchange: Exchange
    layouts: tuple[TensorLayout, ...]
    buffers: tuple[torch.Tensor, ...]
    counts: torch.Tensor
    format: DispatchFormat


class LowLatencyDispatcher:
    """Sends a block of fixed size to each rank, whose experts' rows return in another.

    A block has a place for each of the ``max_tokens_per_rank`` tokens that a rank may bring, so
    that no count has to be known before it is sent: shapes never change, and nothing waits for the
    device. The price is bytes: G times the capacity are sent, however few tokens there are, and K
    times that come back. Rows arrive by local expert, then source rank, token and choice; an
    expert that a token names twice gets one row. Sums are those of the normal exchange.

    Args:
        request: the layer; all ranks ask for the same. With ``two_stage`` a dispatch only sends,
            and rows, scales and counts are poison until they are received.
        group: the ranks.
        poison: fill undefined rows with what is not a number, to find who reads them.
    """

    def __init__(
        self, request: TokenDispatcherRequest, group: ExpertParallelGroup, *, poison: bool = False
    ) -> None:
        self.request = request
        self.group = group
        self.poison = poison
        self.num_local_experts = len(group.share(request.num_experts))
        self.capacity = request.max_tokens_per_rank

    def dispatch(
        self, hidden_TH: torch.Tensor, routing: Routing, format: DispatchFormat
    ) -> tuple[DispatchedTokens, LowLatencyHandle]:
        """Send the rows; every rank calls this, also one without tokens.

        Raises:
            CapacityError: more tokens than ``max_tokens_per_rank``.
            ContractError: a format of another mode, or unquantised rows of another dtype.
            RankLostError: a rank died, or did not take part in time.
        """
        self._check(hidden_TH, format)
        rows, scales = outgoing_rows(hidden_TH, format, self.request.layer)
        is_none = routing.topk_ids < 0
        rank_of_choice = torch.where(
            is_none, self.group.world_size, routing.topk_ids // self.num_local_experts
        )
        blocks = self._blocks(rows, scales, routing.topk_ids, rank_of_choice)
        exchange = start_exchange(self.group, f"the dispatch of layer {self.request.layer}", blocks)
        arrival = self._expect(exchange, format, hidden_TH.device)
        handle = LowLatencyHandle(
            rank_of_choice=rank_of_choice,
            routing_weights=routing_weights_of_experts(routing),
            num_rows=arrival.buffers[0].shape[0] - 1,
        )
        receive = partial(self._receive, arrival, handle)
        if not self.request.two_stage:
            receive()
        row_buffer, *scale_buffer = (
            in_layout(buffer[: handle.num_rows], format.row_layout, self.num_local_experts)
            for buffer in arrival.buffers
        )
        tokens = DispatchedTokens(
            rows=row_buffer,
            scales=scale_buffer[0] if scale_buffer else None,
            group_list=arrival.counts,
            group_list_kind=GroupListKind.COUNTS,
            group_counts=None,
            format=format,
            receive=receive if self.request.two_stage else None,
        )
        return tokens, handle

    def combine(self, rows_RH: torch.Tensor, handle: DispatchHandle) -> torch.Tensor:
        """Bring the experts' rows home and sum them; every rank calls this.

        Raises:
            ContractError: fewer rows than there is room for, not a float row for each, or rows
                that were never received.
            RankLostError: a rank died, or did not take part in time.
        """
        assert isinstance(handle, LowLatencyHandle)
        layer = self.request.layer
        if handle.slot_of_choice is None:
            raise ContractError(
                f"layer {layer}: rows are combined that were not received",
                reason=ReasonCode.CONTRACT_BROKEN,
                expected="receive() of the dispatched tokens before their rows are used",
            )
        check_expert_rows(rows_RH, handle.num_rows, self.request.hidden_size, layer)
        # Where a choice has no row here, any row will do: at home it is not looked at.
        slots = handle.slot_of_choice.flatten().clamp(max=handle.num_rows - 1)
        returned = rows_RH.flatten(0, -2).index_select(0, slots)
        home = start_exchange(self.group, f"the combine of layer {layer}", returned).wait()
        home_slots = self._home_slots(handle.rank_of_choice)
        return sum_choices(rows_in_slots(home, home_slots, home.shape[0]), handle.routing_weights)

    def _check(self, hidden_TH: torch.Tensor, format: DispatchFormat) -> None:
        assert hidden_TH.shape[1] == self.request.hidden_size
        if format.mode is not DispatchMode.LOW_LATENCY:
            raise ContractError(
                f"layer {self.request.layer}: a {format.mode.value} format in the low-latency"
                " exchange",
                reason=ReasonCode.CONTRACT_BROKEN,
                expected="a low_latency format",
            )
        check_capacity(hidden_TH.shape[0], self.capacity, self.request.layer)

    def _blocks(
        self,
        rows: torch.Tensor,
        scales: torch.Tensor | None,
        topk_ids: torch.Tensor,
        rank_of_choice: torch.Tensor,
    ) -> torch.Tensor:
        """What goes to each rank, ``[G * capacity, B]``: rows, scales, and experts' numbers there.

        Every rank gets every row; the numbers say which of them its experts want.
        """
        world_size, (num_tokens, num_choices) = self.group.world_size, topk_ids.shape
        rank = torch.arange(world_size, device=topk_ids.device).view(-1, 1, 1)
        local_ids = torch.where(rank_of_choice == rank, topk_ids % self.num_local_experts, -1)
        ids = pack([local_ids.to(torch.int32).view(world_size * num_tokens, num_choices)])
        row = pack([rows] if scales is None else [rows, scales])
        num_bytes = row.shape[1] + ids.shape[1]
        # Bytes of ones: where there is no token, the number of its experts is -1.
        blocks = row.new_full((world_size, self.capacity, num_bytes), 0xFF)
        blocks[:, :num_tokens, : row.shape[1]] = row
        blocks[:, :num_tokens, row.shape[1] :] = ids.view(world_size, num_tokens, ids.shape[1])
        return blocks.view(world_size * self.capacity, num_bytes)

    def _expect(self, exchange: Exchange, format: DispatchFormat, device: torch.device) -> Arrival:
        num_choices = self.request.num_experts_per_tok
        row_layout, scale_layout = row_tensors(format, self.request.hidden_size)
        layouts = (row_layout,) if scale_layout is None else (row_layout, scale_layout)
        num_rows = fixed_num_rows(
            format, num_choices, self.num_local_experts, self.group.world_size * self.capacity
        )
        poison = self.poison or self.request.two_stage
        return Arrival(
            exchange=exchange,
            layouts=(*layouts, TensorLayout((num_choices,), torch.int32)),
            buffers=tuple(
                undefined_rows(layout, num_rows, device, poison=poison) for layout in layouts
            ),
            counts=torch.full((self.num_local_experts,), -1, device=device),
            format=format,
        )

    def _receive(self, arrival: Arrival, handle: LowLatencyHandle) -> None:
        """Wait for the rows and put them where the dispatched tokens have them."""
        if handle.slot_of_choice is not None:
            return
        *parts, ids = unpack(arrival.exchange.wait(), arrival.layouts)
        arrangement = arrange_choices(
            ids.long(),
            self.num_local_experts,
            arrival.format,
            capacity=self.group.world_size * self.capacity,
        )
        for buffer, part in zip(arrival.buffers, parts, strict=True):
            fill_rows(buffer, part, arrangement)
        arrival.counts.copy_(arrangement.counts)
        handle.slot_of_choice = arrangement.slot_of_choice()

    def _home_slots(self, rank_of_choice: torch.Tensor) -> torch.Tensor:
        """Where each choice's row lies in what came home, ``[G, capacity, K]`` laid flat."""
        num_tokens, num_choices = rank_of_choice.shape
        device = rank_of_choice.device
        token = torch.arange(num_tokens, device=device).unsqueeze(1)
        choice = torch.arange(num_choices, device=device)
        slots = (rank_of_choice * self.capacity + token) * num_choices + choice
        num_slots = self.group.world_size * self.capacity * num_choices
        return torch.where(rank_of_choice == self.group.world_size, num_slots, slots)
