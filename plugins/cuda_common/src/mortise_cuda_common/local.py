"""The exchange within one process: the programs that bring rows to their experts and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch

from mortise.formats.fp8 import pack_ue8m0
from mortise.formats.outgoing import (
    check_capacity,
    check_expert_rows,
    routing_weights_of_experts,
)
from mortise.plugin import (
    ContractError,
    DispatchDtype,
    DispatchedTokens,
    DispatchMode,
    GroupListKind,
    ReasonCode,
    RowLayout,
    ScaleFormat,
)
from mortise_cuda_common.dispatchers.repetition import first_naming, without_repetition
from mortise_cuda_common.kernels.permutation import permute, unpermute

if TYPE_CHECKING:
    from mortise.plugin import (
        DispatchFormat,
        DispatchHandle,
        Routing,
        TokenDispatcherRequest,
    )
    from mortise_cuda_common.kernels.permutation import Permuted
    from mortise_cuda_common.runtime import Runtime

PERMUTED: Final = frozenset({DispatchDtype.FP32, DispatchDtype.BF16, DispatchDtype.FP8_E4M3})
"""Formats that the programs make."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalHandle:
    """Where each choice's row is.

    Args:
        row_of_TK: int32 ``[T, K]``, -1 where a choice has none.
        weights_TK: float32 ``[T, K]``.
        num_rows: rows that were dispatched, with padding and unused ones.
    """

    row_of_TK: torch.Tensor
    weights_TK: torch.Tensor
    num_rows: int


class ProgramDispatcher:
    """``permute`` and ``unpermute``, for one process that holds all experts.

    The first orders copies of the rows by expert and quantises them where the format says so; the
    second sums them in float32, in the order of the choices. Nothing waits for a number to reach
    the host.

    Args:
        runtime: runs the programs.
        request: the layer.
    """

    def __init__(self, runtime: Runtime, request: TokenDispatcherRequest) -> None:
        self._programs = runtime.programs
        self._request = request

    def dispatch(
        self, hidden_TH: torch.Tensor, routing: Routing, format: DispatchFormat
    ) -> tuple[DispatchedTokens, LocalHandle]:
        """Order the rows of all choices by expert; those of -1 get none.

        Raises:
            ContractError: a format that is not made here, or unquantised rows of another dtype.
            CapacityError: more tokens than a low-latency dispatch was made for.
        """
        self._check(hidden_TH, format)
        capacity = self._capacity(hidden_TH.shape[0], format)
        ids_TK = routing.topk_ids
        moved = permute(
            self._programs,
            hidden_TH,
            ids_TK if capacity is None else without_repetition(ids_TK),
            self._request.num_experts,
            format.alignment if format.row_layout is RowLayout.GROUPED_ALIGNED else 1,
            format.scale_format,
            capacity,
        )
        row_of_TK = moved.row_of_TK
        if capacity is not None:
            # A choice that repeats an expert reads the row of the first that names it.
            row_of_TK = row_of_TK.gather(1, first_naming(ids_TK))
        handle = LocalHandle(
            row_of_TK=row_of_TK,
            weights_TK=routing_weights_of_experts(routing),
            num_rows=moved.groups.num_rows,
        )
        return _tokens(moved, format), handle

    def combine(self, rows_RH: torch.Tensor, handle: DispatchHandle) -> torch.Tensor:
        """Sum each token's rows by its routing weights.

        Raises:
            ContractError: fewer rows than were dispatched, or not a float row for each.
        """
        assert isinstance(handle, LocalHandle)
        hidden_size = self._request.hidden_size
        check_expert_rows(rows_RH, handle.num_rows, hidden_size, self._request.layer)
        flat_RH = rows_RH.flatten(0, -2)
        return unpermute(self._programs, flat_RH, handle.row_of_TK, handle.weights_TK)

    def _check(self, hidden_TH: torch.Tensor, format: DispatchFormat) -> None:
        layer = self._request.layer
        if format.dtype not in PERMUTED:
            raise ContractError(
                f"layer {layer}: {format.dtype.value} rows are to be dispatched",
                reason=ReasonCode.CONTRACT_BROKEN,
                expected=f"{', '.join(sorted(PERMUTED))} rows",
            )
        wanted = torch.float32 if format.dtype is DispatchDtype.FP32 else torch.bfloat16
        if format.dtype is not DispatchDtype.FP8_E4M3 and hidden_TH.dtype is not wanted:
            raise ContractError(
                f"layer {layer}: {hidden_TH.dtype} rows are to be sent as {format.dtype.value}",
                reason=ReasonCode.CONTRACT_BROKEN,
                expected=f"rows of {wanted}: they are sent as they are",
            )

    def _capacity(self, num_tokens: int, format: DispatchFormat) -> int | None:
        """Most tokens that one expert may get, where that sizes the rows."""
        most = self._request.max_tokens_per_rank
        if format.mode is DispatchMode.LOW_LATENCY and most:
            check_capacity(num_tokens, most, self._request.layer)
        if format.row_layout is not RowLayout.MASKED:
            return None
        return most if format.mode is DispatchMode.LOW_LATENCY and most else num_tokens


def _tokens(moved: Permuted, format: DispatchFormat) -> DispatchedTokens:
    rows, scales, groups = moved.rows.values, moved.rows.scales, moved.groups
    if scales is not None and format.scale_format is ScaleFormat.UE8M0:
        scales = pack_ue8m0(scales.contiguous())
    if groups.capacity is not None:
        places = (groups.num_groups, groups.capacity)
        rows = rows.unflatten(0, places)
        scales = None if scales is None else scales.unflatten(0, places)
    return DispatchedTokens(
        rows=rows,
        scales=scales,
        group_list=groups.counts.to(torch.int64),
        group_list_kind=GroupListKind.COUNTS,
        group_counts=None,
        format=format,
    )
