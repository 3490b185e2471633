"""The exchange of fixed shapes through DeepEP: always the same memory, and counts on the device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mortise.formats.outgoing import check_capacity, routing_weights_of_experts
from mortise.plugin import (
    ContractError,
    DispatchDtype,
    DispatchedTokens,
    GroupListKind,
    ReasonCode,
    ScaleFormat,
)
from mortise_cuda_common.dispatchers.checks import arrived, check_made, check_outgoing
from mortise_cuda_common.dispatchers.repetition import without_repetition

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from mortise.plugin import (
        DispatchFormat,
        DispatchHandle,
        Routing,
        TokenDispatcherRequest,
    )
    from mortise_cuda_common.dispatchers.connection import Connection


@dataclass(slots=True, kw_only=True)
class LowLatencyHandle:
    """What brings rows home.

    Args:
        kept: the library's handle.
        ids_TK: the experts of each token, in the library's dtype.
        weights_TK: float32, their routing weights.
        is_received: whether the rows have been.
    """

    kept: Any
    ids_TK: torch.Tensor
    weights_TK: torch.Tensor
    is_received: bool


class LowLatencyExchange:
    """``Buffer.low_latency_dispatch`` and ``low_latency_combine``.

    Rows arrive masked, in an order of their own within an expert; an expert that a token names
    twice gets one row. The library quantises fp8 rows itself, by a rule that differs from the
    normal exchange's in the last bit of a scale and for magnitudes below 1e-4, and on the way back
    weights and sums them in float32.

    Args:
        request: the layer; all ranks ask for the same. With ``two_stage`` a dispatch only sends.
        connection: between the ranks.
    """

    def __init__(self, request: TokenDispatcherRequest, connection: Connection) -> None:
        self._request = request
        self._connection = connection
        self._capacity = request.world_size * request.max_tokens_per_rank
        self._num_rows = request.num_experts // request.world_size * self._capacity

    def dispatch(
        self, hidden_TH: torch.Tensor, routing: Routing, format: DispatchFormat
    ) -> tuple[DispatchedTokens, LowLatencyHandle]:
        """Send the rows; every rank calls this, also one without tokens.

        Raises:
            ContractError: another format than the exchange was made for, rows of another dtype, or
                an exchange that was not received.
            CapacityError: more tokens than ``max_tokens_per_rank``.
        """
        request = self._request
        check_outgoing(hidden_TH, format, request)
        check_capacity(hidden_TH.shape[0], request.max_tokens_per_rank, request.layer)
        fp8 = format.dtype is DispatchDtype.FP8_E4M3
        powers = format.scale_format is ScaleFormat.UE8M0
        # The library has places for each token once at each expert. On the way back it reads that
        # one row for every choice that names the expert, so those are given to it as they are.
        received, counts, kept, _, hook = self._connection.low_latency(
            request
        ).low_latency_dispatch(
            hidden_TH.contiguous(),
            self._connection.ids(without_repetition(routing.topk_ids)),
            request.max_tokens_per_rank,
            request.num_experts,
            use_fp8=fp8,
            round_scale=powers,
            use_ue8m0=powers,
            async_finish=False,
            return_recv_hook=request.two_stage,
        )
        if hook is not None:
            self._connection.wait(request.layer)
        rows, scales = arrived(received, format, request.layer)
        handle = LowLatencyHandle(
            kept=kept,
            ids_TK=self._connection.ids(routing.topk_ids),
            weights_TK=routing_weights_of_experts(routing).contiguous(),
            is_received=hook is None,
        )
        group_list = counts.long()
        tokens = DispatchedTokens(
            rows=rows,
            scales=scales,
            group_list=group_list,
            group_list_kind=GroupListKind.COUNTS,
            group_counts=None,
            format=format,
            receive=None if hook is None else self._receive(hook, counts, group_list, handle),
        )
        return tokens, handle

    def combine(self, rows_RH: torch.Tensor, handle: DispatchHandle) -> torch.Tensor:
        """Bring the experts' rows home and sum them; every rank calls this.

        Raises:
            ContractError: not a bfloat16 row for each place, or rows that were never received.
        """
        assert isinstance(handle, LowLatencyHandle)
        request = self._request
        if not handle.is_received:
            raise ContractError(
                f"layer {request.layer}: rows are combined that were not received",
                reason=ReasonCode.CONTRACT_BROKEN,
                expected="receive() of the dispatched tokens before their rows are used",
            )
        check_made(rows_RH, self._num_rows, request)
        made = rows_RH.flatten(0, -2)[: self._num_rows].contiguous()
        combined, _, _ = self._connection.low_latency(request).low_latency_combine(
            made.view(-1, self._capacity, request.hidden_size),
            handle.ids_TK,
            handle.weights_TK,
            handle.kept,
            async_finish=False,
            return_recv_hook=False,
        )
        result: torch.Tensor = combined
        return result

    def _receive(
        self,
        hook: Callable[[], None],
        counts: torch.Tensor,
        group_list: torch.Tensor,
        handle: LowLatencyHandle,
    ) -> Callable[[], None]:
        """The second stage; calling it again does nothing, which the library's hook would not."""

        def receive() -> None:
            if handle.is_received:
                return
            hook()
            group_list.copy_(counts)
            handle.is_received = True
            self._connection.received()

        return receive
