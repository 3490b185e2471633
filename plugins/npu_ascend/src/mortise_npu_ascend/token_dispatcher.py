"""The exchange within one process: the device's routing operators."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch

from mortise.formats.outgoing import (
    check_capacity,
    check_expert_rows,
    outgoing_rows,
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
)

if TYPE_CHECKING:
    from mortise.plugin import DispatchFormat, DispatchHandle, Routing, TokenDispatcherRequest
    from mortise_npu_ascend.vendor import Vendor

ROUTED: Final = frozenset({DispatchDtype.FP32, DispatchDtype.BF16, DispatchDtype.INT8})
"""Formats that the routing operator of every generation makes."""

_UNQUANTISED: Final = -1
_DYNAMIC: Final = 1
_COUNTS: Final = 1
_PLACES_BY_TOKEN: Final = 2
"""``drop_pad_mode`` of the operator that brings rows home: no padding, indexed token by token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingHandle:
    """Where each choice's row is.

    Args:
        places: int32 ``[T * K]``, the row of each choice, -1 where it has none.
        topk_ids: int64 ``[T, K]``.
        routing_weights: float32 ``[T, K]``.
    """

    places: torch.Tensor
    topk_ids: torch.Tensor
    routing_weights: torch.Tensor


class RoutingDispatcher:
    """``npu_moe_init_routing_v2`` and ``npu_moe_finalize_routing``, for one process.

    The first orders copies of the rows by expert and quantises them where the format says so; the
    second sums them in float32, by weights of float32. Nothing waits for a number to reach the
    host.

    Args:
        vendor: the operators and their device.
        request: the layer.
    """

    def __init__(self, vendor: Vendor, request: TokenDispatcherRequest) -> None:
        self._npu = vendor.torch_npu
        self._request = request

    def dispatch(
        self, hidden_TH: torch.Tensor, routing: Routing, format: DispatchFormat
    ) -> tuple[DispatchedTokens, RoutingHandle]:
        """Order the rows of all choices by expert; those of -1 get none.

        Raises:
            ContractError: a format that is not routed here, or unquantised rows of another dtype.
            CapacityError: more tokens than a low-latency dispatch was made for.
        """
        self._check(hidden_TH, format)
        ids_TK = routing.topk_ids.to(torch.int32)
        if not ids_TK.shape[0]:
            rows, scales, counts, places = self._nothing(hidden_TH, format)
        else:
            rows, places, counts, scales = self._npu.npu_moe_init_routing_v2(
                hidden_TH,
                ids_TK,
                active_num=ids_TK.numel(),
                expert_num=self._request.num_experts,
                expert_tokens_num_type=_COUNTS,
                expert_tokens_num_flag=True,
                quant_mode=_DYNAMIC if format.dtype is DispatchDtype.INT8 else _UNQUANTISED,
                active_expert_range=[0, self._request.num_experts],
                row_idx_type=0,
            )
        tokens = DispatchedTokens(
            rows=rows,
            scales=scales if format.dtype is DispatchDtype.INT8 else None,
            group_list=counts,
            group_list_kind=GroupListKind.COUNTS,
            group_counts=None,
            format=format,
        )
        handle = RoutingHandle(
            places=places,
            topk_ids=routing.topk_ids,
            routing_weights=routing_weights_of_experts(routing),
        )
        return tokens, handle

    def combine(self, rows_RH: torch.Tensor, handle: DispatchHandle) -> torch.Tensor:
        """Sum each token's rows by its routing weights.

        Raises:
            ContractError: fewer rows than were dispatched, or not a float row for each.
        """
        assert isinstance(handle, RoutingHandle)
        num_rows = handle.places.shape[0]
        check_expert_rows(rows_RH, num_rows, self._request.hidden_size, self._request.layer)
        if not num_rows:
            return rows_RH.new_empty(handle.topk_ids.shape[0], rows_RH.shape[1])
        # A choice without a row reads another one, and multiplies it by zero.
        summed_TH = self._npu.npu_moe_finalize_routing(
            rows_RH[:num_rows],
            None,
            None,
            None,
            handle.routing_weights,
            handle.places.clamp(min=0),
            None,
            drop_pad_mode=_PLACES_BY_TOKEN,
        )
        # Where no token has any, that other row was never written, and may not be a number.
        has_none_T = (handle.topk_ids < 0).all(dim=1)
        result: torch.Tensor = summed_TH.masked_fill(has_none_T.unsqueeze(1), 0)
        return result

    def _check(self, hidden_TH: torch.Tensor, format: DispatchFormat) -> None:
        if format.dtype not in ROUTED or format.row_layout is not RowLayout.GROUPED:
            raise ContractError(
                f"layer {self._request.layer}: {format.dtype.value} rows are to be dispatched,"
                f" {format.row_layout.value}",
                reason=ReasonCode.CONTRACT_BROKEN,
                expected=f"{', '.join(sorted(ROUTED))} rows, {RowLayout.GROUPED.value}",
            )
        if format.dtype is not DispatchDtype.INT8:
            outgoing_rows(hidden_TH, format, self._request.layer)
        capacity = self._request.max_tokens_per_rank
        if format.mode is DispatchMode.LOW_LATENCY and capacity:
            check_capacity(hidden_TH.shape[0], capacity, self._request.layer)

    def _nothing(
        self, hidden_TH: torch.Tensor, format: DispatchFormat
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """No row, no scale, no row of any expert, no place: operators refuse empty tensors."""
        is_int8 = format.dtype is DispatchDtype.INT8
        device = hidden_TH.device
        return (
            hidden_TH.to(torch.int8) if is_int8 else hidden_TH,
            torch.empty(0, device=device),
            torch.zeros(self._request.num_experts, dtype=torch.int64, device=device),
            torch.empty(0, dtype=torch.int32, device=device),
        )
