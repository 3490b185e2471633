"""The exchange between processes by DeepEP's port: in both modes, rows and the way back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch

from mortise.formats.outgoing import (
    check_capacity,
    check_expert_rows,
    routing_weights_of_experts,
)
from mortise.plugin import (
    ConfigError,
    ContractError,
    DispatchDtype,
    DispatchedTokens,
    GroupListKind,
    ReasonCode,
    Routing,
)
from mortise_npu_ascend.environment import INT8_DISPATCH
from mortise_npu_ascend.exchange_library import MOST_TOKENS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mortise.plugin import DispatchFormat, DispatchHandle, TokenDispatcherRequest

ROW_DTYPES: Final = ((DispatchDtype.BF16, torch.bfloat16), (DispatchDtype.INT8, torch.int8))


class Connection:
    """One buffer of the library between the ranks of a group.

    What a normal dispatch finds out about the ranks lies in the buffer until the next one, and its
    combine reads it there; so they go in turns.

    Args:
        buffer: ``deep_ep.Buffer``.
        counts_are_ends: whether its numbers of rows are cumulative.
    """

    __slots__ = ("buffer", "counts_are_ends", "latest")

    def __init__(self, buffer: Any, *, counts_are_ends: bool) -> None:
        self.buffer = buffer
        self.counts_are_ends = counts_are_ends
        self.latest = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class NormalHandle:
    """What brings rows home.

    Args:
        kept: the library's handle; it remembers the routing weights too, and multiplies by them.
        number: which dispatch through its connection this was.
        num_rows: rows that arrived.
    """

    kept: Any
    number: int
    num_rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LowLatencyHandle:
    """What brings rows home.

    Args:
        kept: the library's handle.
        routing: the choices as they were sent, an expert for each.
        num_tokens: tokens there were.
        num_rows: rows of this rank's experts, used or not.
    """

    kept: Any
    routing: Routing
    num_tokens: int
    num_rows: int


class NormalExchange:
    """``Buffer.dispatch`` and ``Buffer.combine``: as many rows as there are.

    A token's row arrives once for each of this rank's experts that it chose, by local expert, then
    by the rank it came from. The library multiplies by the routing weights on the way back, by
    those of the dispatch: experts must not.

    Args:
        request: the layer; all ranks ask for the same.
        connection: between the ranks.
        arguments: what states the format of the rows (``exchange_format``).
    """

    def __init__(
        self,
        request: TokenDispatcherRequest,
        connection: Connection,
        arguments: Mapping[str, object],
    ) -> None:
        self._request = request
        self._connection = connection
        self._arguments = arguments

    def dispatch(
        self, hidden_TH: torch.Tensor, routing: Routing, format: DispatchFormat
    ) -> tuple[DispatchedTokens, NormalHandle]:
        """Send the rows; every rank calls this, also one without tokens.

        Raises:
            ContractError: another format than the exchange was made for, or rows of another dtype.
            ConfigError: more tokens than the library takes at a time.
        """
        check_request(hidden_TH, format, self._request)
        if hidden_TH.shape[0] > MOST_TOKENS:
            raise ConfigError(
                f"layer {self._request.layer}: DeepEP is to send {hidden_TH.shape[0]} tokens",
                expected=f"at most {MOST_TOKENS} of one rank at a time",
                remedy=f"set scheduler.max_num_batched_tokens to at most {MOST_TOKENS}, or option"
                " exchange of backend npu_ascend to 'portable'",
            )
        buffer, ids_TK = self._connection.buffer, routing.topk_ids.contiguous()
        to_rank, to_machine, to_expert, is_in_rank, _ = buffer.get_dispatch_layout(
            ids_TK, self._request.num_experts
        )
        received, _, _, numbers, kept, _ = buffer.dispatch(
            hidden_TH.contiguous(),
            num_tokens_per_rank=to_rank,
            num_tokens_per_rdma_rank=to_machine,
            is_token_in_rank=is_in_rank,
            num_tokens_per_expert=to_expert,
            topk_idx=ids_TK,
            topk_weights=routing_weights_of_experts(routing).contiguous(),
            **self._arguments,
        )
        self._connection.latest += 1
        rows, scales = received_rows(received, format, self._request.layer)
        counts = _as_counts(numbers) if self._connection.counts_are_ends else numbers
        tokens = DispatchedTokens(
            rows=rows,
            scales=scales,
            group_list=torch.tensor(counts, dtype=torch.int64, device=rows.device),
            group_list_kind=GroupListKind.COUNTS,
            group_counts=tuple(counts),
            format=format,
        )
        handle = NormalHandle(kept=kept, number=self._connection.latest, num_rows=rows.shape[0])
        return tokens, handle

    def combine(self, rows_RH: torch.Tensor, handle: DispatchHandle) -> torch.Tensor:
        """Bring the experts' rows home and sum them; every rank calls this.

        Raises:
            ContractError: not a bfloat16 row for each that arrived, or another dispatch has begun.
        """
        assert isinstance(handle, NormalHandle)
        check_made_rows(rows_RH, handle.num_rows, self._request)
        if handle.number != self._connection.latest:
            raise ContractError(
                f"layer {self._request.layer}: rows are combined after another dispatch began",
                reason=ReasonCode.CONTRACT_BROKEN,
                expected="the combine of one dispatch before the next dispatch: DeepEP's buffer"
                " remembers one of them",
            )
        combined, _, _ = self._connection.buffer.combine(
            rows_RH[: handle.num_rows].contiguous(), handle.kept
        )
        result: torch.Tensor = combined
        return result


class LowLatencyExchange:
    """``Buffer.low_latency_dispatch`` and ``low_latency_combine``: always the same shapes.

    Rows arrive flat, one expert after the other, in memory for whatever may come; how many they
    are stays on the device.

    Args:
        request: the layer; all ranks ask for the same.
        connection: between the ranks.
        arguments: what states the format of the rows (``exchange_format``).
    """

    def __init__(
        self,
        request: TokenDispatcherRequest,
        connection: Connection,
        arguments: Mapping[str, object],
    ) -> None:
        self._request = request
        self._connection = connection
        self._arguments = arguments

    def dispatch(
        self, hidden_TH: torch.Tensor, routing: Routing, format: DispatchFormat
    ) -> tuple[DispatchedTokens, LowLatencyHandle]:
        """Send the rows; every rank calls this, also one without tokens.

        Raises:
            ContractError: another format than the exchange was made for, or rows of another dtype.
            CapacityError: more tokens than ``max_tokens_per_rank``.
        """
        check_request(hidden_TH, format, self._request)
        num_tokens, capacity = hidden_TH.shape[0], self._request.max_tokens_per_rank
        check_capacity(num_tokens, capacity, self._request.layer)
        if not num_tokens:
            hidden_TH, routing = _one_token(hidden_TH, routing)
        sent = every_choice_an_expert(routing, self._request.num_experts)
        received, numbers, kept, _, _ = self._connection.buffer.low_latency_dispatch(
            hidden_TH.contiguous(),
            sent.topk_ids,
            capacity,
            self._request.num_experts,
            async_finish=False,
            return_recv_hook=False,
            topk_weights=sent.topk_weights,
            **self._arguments,
        )
        rows, scales = received_rows(received, format, self._request.layer)
        ends = self._connection.counts_are_ends
        tokens = DispatchedTokens(
            rows=rows,
            scales=scales,
            group_list=numbers.to(torch.int64),
            group_list_kind=GroupListKind.CUMULATIVE if ends else GroupListKind.COUNTS,
            group_counts=None,
            format=format,
        )
        handle = LowLatencyHandle(
            kept=kept, routing=sent, num_tokens=num_tokens, num_rows=rows.shape[0]
        )
        return tokens, handle

    def combine(self, rows_RH: torch.Tensor, handle: DispatchHandle) -> torch.Tensor:
        """Bring the experts' rows home and sum them; every rank calls this.

        Raises:
            ContractError: not a bfloat16 row for each place.
        """
        assert isinstance(handle, LowLatencyHandle)
        check_made_rows(rows_RH, handle.num_rows, self._request)
        combined, _, _ = self._connection.buffer.low_latency_combine(
            rows_RH[: handle.num_rows].contiguous(),
            handle.routing.topk_ids,
            handle.routing.topk_weights,
            handle.kept,
        )
        result: torch.Tensor = combined[: handle.num_tokens]
        return result


def every_choice_an_expert(routing: Routing, num_experts: int) -> Routing:
    """The same sums, with distinct experts for every token and none that is -1.

    The low-latency kernels want both. A choice of no expert, and one of an expert that the token
    has named before, becomes one of an expert that it has not, by a weight of zero; the weight of
    a repeated choice goes to the first. Nothing waits for a number to reach the host.

    Args:
        routing: at most ``num_experts`` choices.
        num_experts: E.
    """
    ids_TK, weights_TK = routing.topk_ids, routing_weights_of_experts(routing)
    num_choices = ids_TK.shape[1]
    same_TKK = ids_TK.unsqueeze(2) == ids_TK.unsqueeze(1)
    first_TK = same_TKK.to(torch.uint8).argmax(dim=2)
    is_spare_TK = (ids_TK < 0) | (first_TK != torch.arange(num_choices, device=ids_TK.device))
    merged_TK = torch.zeros_like(weights_TK).scatter_add_(1, first_TK, weights_TK)
    # One more column takes the choices of no expert.
    is_named_TE = weights_TK.new_zeros(ids_TK.shape[0], num_experts + 1)
    is_named_TE.scatter_(1, torch.where(ids_TK < 0, num_experts, ids_TK), 1.0)
    unnamed_TK = is_named_TE[:, :num_experts].topk(num_choices, dim=1, largest=False).indices
    place_TK = (is_spare_TK.long().cumsum(dim=1) - 1).clamp(min=0)
    return Routing(
        topk_ids=torch.where(is_spare_TK, unnamed_TK.gather(1, place_TK), ids_TK),
        topk_weights=merged_TK.masked_fill(is_spare_TK, 0.0),
    )


def _one_token(hidden_TH: torch.Tensor, routing: Routing) -> tuple[torch.Tensor, Routing]:
    """A token for a rank that has none: the low-latency kernels want one, whose sum is dropped."""
    num_choices = routing.topk_ids.shape[1]
    return hidden_TH.new_zeros(1, hidden_TH.shape[1]), Routing(
        topk_ids=routing.topk_ids.new_full((1, num_choices), -1),
        topk_weights=routing.topk_weights.new_zeros(1, num_choices),
    )


def check_request(
    hidden_TH: torch.Tensor, format: DispatchFormat, request: TokenDispatcherRequest
) -> None:
    """Raise where rows are not those that the exchange was made for.

    Raises:
        ContractError: another format, or rows that are not bfloat16.
    """
    if format != request.format:
        raise ContractError(
            f"layer {request.layer}: {format.dtype.value} rows in an exchange of another format",
            reason=ReasonCode.CONTRACT_BROKEN,
            expected=f"the format that was decided when the layer was built: {request.format}",
        )
    if hidden_TH.dtype is not torch.bfloat16:
        raise ContractError(
            f"layer {request.layer}: {hidden_TH.dtype} rows are to be sent",
            reason=ReasonCode.CONTRACT_BROKEN,
            expected="torch.bfloat16, which DeepEP sends or quantises",
        )


def check_made_rows(rows_RH: torch.Tensor, num_rows: int, request: TokenDispatcherRequest) -> None:
    """Raise where DeepEP cannot bring home what the experts made.

    Raises:
        ContractError: fewer rows than arrived, or rows that are not bfloat16.
    """
    check_expert_rows(rows_RH, num_rows, request.hidden_size, request.layer)
    if rows_RH.dtype is not torch.bfloat16:
        raise ContractError(
            f"layer {request.layer}: the experts made {rows_RH.dtype} rows",
            reason=ReasonCode.CONTRACT_BROKEN,
            expected="torch.bfloat16, which DeepEP brings home",
        )


def received_rows(
    received: object, format: DispatchFormat, layer: str
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rows and scales as the library gave them, if they are what it was asked for.

    Raises:
        ContractError: they are not: the library did not follow its argument.
    """
    rows, scales = received if isinstance(received, tuple) else (received, None)
    wanted = dict(ROW_DTYPES)[format.dtype]
    if rows.dtype is wanted and (scales is None) is (format.dtype is DispatchDtype.BF16):
        return rows, scales
    raise ContractError(
        f"layer {layer}: DeepEP was asked for {format.dtype.value} rows and sent {rows.dtype}"
        f" {'without' if scales is None else 'with'} scales",
        reason=ReasonCode.CONTRACT_BROKEN,
        expected=str(wanted),
        remedy=f"unset {INT8_DISPATCH}, or set option exchange of backend npu_ascend to 'portable'",
    )


def _as_counts(ends: list[int]) -> list[int]:
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]
