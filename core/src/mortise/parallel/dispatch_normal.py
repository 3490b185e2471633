"""The portable exchange of variable size: each row goes once to every rank that wants it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch

from mortise.errors import ContractError
from mortise.formats.arrangement import arrange_choices, arrange_rows, movable, sum_choices
from mortise.formats.layout import TensorLayout
from mortise.formats.outgoing import (
    check_expert_rows,
    outgoing_rows,
    routing_weights_of_experts,
)
from mortise.formats.rows import row_tensors
from mortise.parallel.collectives import exchange_counts, start_exchange
from mortise.parallel.packets import pack, unpack
from mortise.spec.dispatch import (
    DispatchedTokens,
    DispatchFormat,
    DispatchHandle,
    DispatchMode,
    GroupListKind,
    Routing,
    RowLayout,
    TokenDispatcherRequest,
)
from mortise.spec.reasons import ReasonCode

if TYPE_CHECKING:
    from mortise.parallel.group import ExpertParallelGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class NormalHandle:
    """How the experts' rows go home, and what they are there.

    Args:
        returned_slots: int64 ``[R]``, rows of this rank's experts in the order in which they
            return: by home rank, token and choice.
        return_counts: of them, to each rank.
        num_rows: rows that arrived here, with padding.
        home_choices: int64 ``[V]``, choices of this rank's tokens, as numbers in the flattened
            ``[T * K]``, in the order in which their rows come home: by expert rank, token, choice.
        home_counts: of them, from each rank.
        routing_weights: float32 ``[T, K]``.
    """

    returned_slots: torch.Tensor
    return_counts: list[int]
    num_rows: int
    home_choices: torch.Tensor
    home_counts: list[int]
    routing_weights: torch.Tensor


class NormalDispatcher:
    """Sends as many rows as there are, and says on the host how many each expert got.

    A token's row is quantised at home and travels once to each rank that holds one of its
    experts, with its scales and the experts' numbers there. What arrives is arranged by local
    expert, then source rank, token and choice. The experts' rows return one for each choice, in
    the dtype the experts made, and are weighted and summed at home in float32: bit for bit what
    one process makes of the same rows.

    Args:
        request: the layer; all ranks ask for the same.
        group: the ranks.
        poison: fill padding with what is not a number, to find who reads it.
    """

    def __init__(
        self, request: TokenDispatcherRequest, group: ExpertParallelGroup, *, poison: bool = False
    ) -> None:
        self.request = request
        self.group = group
        self.poison = poison
        self.num_local_experts = len(group.share(request.num_experts))

    def dispatch(
        self, hidden_TH: torch.Tensor, routing: Routing, format: DispatchFormat
    ) -> tuple[DispatchedTokens, NormalHandle]:
        """Send the rows; every rank calls this, also one without tokens.

        Raises:
            ContractError: a format of another mode, or unquantised rows of another dtype.
            RankLostError: a rank died, or did not take part in time.
        """
        assert hidden_TH.shape[1] == self.request.hidden_size
        self._check(format)
        rows, scales = outgoing_rows(hidden_TH, format, self.request.layer)
        parts = [rows] if scales is None else [rows, scales]
        # No expert belongs to a rank behind all others.
        rank_of_choice = torch.where(
            routing.topk_ids < 0,
            self.group.world_size,
            routing.topk_ids // self.num_local_experts,
        )
        packets, send_counts = self._packets(parts, routing.topk_ids, rank_of_choice)
        received, receive_counts = self._send(packets, send_counts)
        *arrived, ids_here = unpack(received, self._layouts(format))
        arrangement = arrange_choices(ids_here.long(), self.num_local_experts, format)
        arranged = [arrange_rows(part, arrangement, poison=self.poison) for part in arrived]
        tokens = DispatchedTokens(
            rows=arranged[0],
            scales=arranged[1] if scales is not None else None,
            group_list=arrangement.counts,
            group_list_kind=GroupListKind.COUNTS,
            group_counts=arrangement.group_counts,
            format=format,
        )
        is_here = ids_here >= 0
        home_choices, home_counts = _grouped(rank_of_choice.flatten(), self.group.world_size)
        handle = NormalHandle(
            returned_slots=arrangement.slot_of_choice()[is_here],
            return_counts=_sums(is_here.sum(1), receive_counts),
            num_rows=arrangement.num_rows,
            home_choices=home_choices,
            home_counts=home_counts,
            routing_weights=routing_weights_of_experts(routing),
        )
        return tokens, handle

    def combine(self, rows_RH: torch.Tensor, handle: DispatchHandle) -> torch.Tensor:
        """Bring the experts' rows home and sum them; every rank calls this.

        Raises:
            ContractError: fewer rows than arrived, or not a float row for each.
            RankLostError: a rank died, or did not take part in time.
        """
        assert isinstance(handle, NormalHandle)
        layer = self.request.layer
        check_expert_rows(rows_RH, handle.num_rows, self.request.hidden_size, layer)
        received_VH = start_exchange(
            self.group,
            f"the combine of layer {layer}",
            rows_RH.index_select(0, handle.returned_slots),
            handle.return_counts,
            handle.home_counts,
        ).wait()
        num_tokens, num_choices = handle.routing_weights.shape
        chosen = received_VH.new_zeros(num_tokens * num_choices, received_VH.shape[1])
        chosen.index_copy_(0, handle.home_choices, received_VH)
        chosen_TKH = chosen.view(num_tokens, num_choices, received_VH.shape[1])
        return sum_choices(chosen_TKH, handle.routing_weights)

    def _check(self, format: DispatchFormat) -> None:
        if format.mode is not DispatchMode.NORMAL or format.row_layout is RowLayout.MASKED:
            raise ContractError(
                f"layer {self.request.layer}: a {format.mode.value} format of"
                f" {format.row_layout.value} rows in the normal exchange",
                reason=ReasonCode.CONTRACT_BROKEN,
                expected="a normal format of grouped or grouped_aligned rows",
            )

    def _packets(
        self, parts: list[torch.Tensor], topk_ids: torch.Tensor, rank_of_choice: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What each rank is sent, and how many packets that is: a row and its experts there."""
        world_size = self.group.world_size
        to_rank, token = _wanted(rank_of_choice, world_size).nonzero(as_tuple=True)
        is_there = rank_of_choice[token] == to_rank.unsqueeze(1)
        ids = torch.where(is_there, topk_ids[token] % self.num_local_experts, -1)
        rows = [movable(part)[token] for part in parts]
        return pack([*rows, ids.to(torch.int32)]), to_rank.bincount(minlength=world_size)

    def _layouts(self, format: DispatchFormat) -> list[TensorLayout]:
        """What a packet holds: the row, its scales if it has any, its experts' numbers."""
        row, scales = row_tensors(format, self.request.hidden_size)
        ids = TensorLayout((self.request.num_experts_per_tok,), torch.int32)
        return [row, ids] if scales is None else [row, scales, ids]

    def _send(
        self, packets: torch.Tensor, send_counts: torch.Tensor
    ) -> tuple[torch.Tensor, list[int]]:
        """Send each rank its packets; returns those that came and how many came from each."""
        doing = f"the dispatch of layer {self.request.layer}"
        receive_counts = exchange_counts(self.group, doing, send_counts)
        sent, expected = cast(
            "list[list[int]]", torch.stack([send_counts, receive_counts]).tolist()
        )
        return start_exchange(self.group, doing, packets, sent, expected).wait(), expected


def _wanted(rank_of_choice: torch.Tensor, world_size: int) -> torch.Tensor:
    """Which rank wants which token at all, bool ``[G, T]``."""
    num_tokens = rank_of_choice.shape[0]
    wanted = rank_of_choice.new_zeros(num_tokens, world_size + 1, dtype=torch.bool)
    return wanted.scatter_(1, rank_of_choice, True)[:, :world_size].T


def _grouped(rank_of_choice: torch.Tensor, world_size: int) -> tuple[torch.Tensor, list[int]]:
    """Choices that have an expert, sorted by its rank, and how many each rank has."""
    counts = rank_of_choice.bincount(minlength=world_size + 1)
    assert counts.shape[0] == world_size + 1, "an expert was chosen that is not there"
    of_ranks = cast("list[int]", counts[:world_size].tolist())
    return rank_of_choice.argsort(stable=True)[: sum(of_ranks)], of_ranks


def _sums(numbers: torch.Tensor, counts: list[int]) -> list[int]:
    """Sum the first numbers, the next, and so on, as many as ``counts`` says."""
    sums = torch.stack([part.sum() for part in numbers.split(counts)])
    return cast("list[int]", sums.tolist())
