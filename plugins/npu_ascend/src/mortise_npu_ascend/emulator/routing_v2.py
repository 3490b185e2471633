"""Rows put in the order of their experts: the second generation, which can quantise them too."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from mortise_npu_ascend.emulator.poison import unwritten
from mortise_npu_ascend.emulator.routing_request import (
    CUMULATIVE,
    DYNAMIC,
    OPERATOR,
    PAIRS,
    STATIC,
    UNQUANTISED,
    RoutingRequest,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


def npu_moe_init_routing_v2(
    x: torch.Tensor,
    expert_idx: torch.Tensor,
    *,
    scale: torch.Tensor | None = None,
    offset: torch.Tensor | None = None,
    active_num: int = -1,
    expert_capacity: int = -1,
    expert_num: int = -1,
    drop_pad_mode: int = 0,
    expert_tokens_num_type: int = 0,
    expert_tokens_num_flag: bool = False,
    quant_mode: int = -1,
    active_expert_range: Sequence[int] = (),
    row_idx_type: int = 0,
    x_dtype: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Copy each row once for each of its active experts, ordered by expert; quantise if asked.

    Copies are numbered row by row: copy ``i * K + j`` is of token i.

    Args:
        x: ``[T, H]``; int8 only unquantised, float16 not to int4.
        expert_idx: int32 ``[T, K]``.
        scale: float32. Unquantised: ``[T]``, moved with the rows. Static: ``[1]``, multiplies.
            Dynamic: ``[1, H]`` or ``[active experts, H]``, multiplies before; int4: ``[1, H]``.
        offset: float32 ``[1]``, added with static quantisation.
        active_num: rows of the result; 0 and -1 for all ``T * K``. A5 takes no fewer.
        expert_capacity: rows of each expert in drop-pad mode.
        expert_num: experts there are.
        drop_pad_mode: 1 gives every expert so many rows, drops more and pads fewer with zeros.
        expert_tokens_num_type: of active experts, 0 the ends of their rows, 1 their counts, 2 pairs
            of expert and count of those that have any, and zeros.
        expert_tokens_num_flag: whether those are written. A5 always wants them.
        quant_mode: -1 none, 0 static int8, 1 dynamic int8, on A5 also 13 dynamic int4, two values a
            byte. The others that A5 has are not emulated.
        active_expert_range: ``[start, end)``; empty for all.
        row_idx_type: 0 gives the place of each copy, -1 for one that is not there; 1 the copy at
            each place.
        x_dtype: None, or int4 with ``quant_mode`` 13.

    Returns:
        Rows ``[T * K, H]``, of which those beyond the active copies are unwritten, or
        ``[expert_num, expert_capacity, H]``; int32 ``[T * K]`` the index; int64 the numbers of
        rows; float32 the scales of the rows, unwritten where there is none.

    Raises:
        RuntimeError: what the device refuses.
    """
    request = RoutingRequest(
        x=x,
        expert_idx=expert_idx,
        scale=scale,
        offset=offset,
        active_num=active_num,
        expert_capacity=expert_capacity,
        expert_num=expert_num,
        drop_pad_mode=drop_pad_mode,
        expert_tokens_num_type=expert_tokens_num_type,
        expert_tokens_num_flag=expert_tokens_num_flag,
        quant_mode=quant_mode,
        active_expert_range=tuple(active_expert_range),
        row_idx_type=row_idx_type,
        x_dtype=x_dtype,
    )
    request.check()
    copies_A, experts_A = _active_copies(request)
    counts_E = torch.bincount(experts_A, minlength=request.end - request.start)
    places_A = _places(request, counts_E, experts_A)
    index_F = _index(request, copies_A, places_A)
    kept_A = places_A >= 0
    rows, scales = _move(request, copies_A[kept_A], experts_A[kept_A], places_A[kept_A])
    return rows, index_F, _numbers(request, counts_E), scales


def _active_copies(request: RoutingRequest) -> tuple[torch.Tensor, torch.Tensor]:
    """Active copies in the order of their experts, and the experts counted from the first one."""
    experts_F = request.expert_idx.flatten().long()
    copies_A = torch.nonzero((experts_F >= request.start) & (experts_F < request.end)).flatten()
    copies_A = copies_A[torch.argsort(experts_F[copies_A], stable=True)]
    return copies_A, experts_F[copies_A] - request.start


def _places(
    request: RoutingRequest, counts_E: torch.Tensor, experts_A: torch.Tensor
) -> torch.Tensor:
    """Where each active copy lies in the result, -1 for one that was dropped."""
    places_A = torch.arange(experts_A.shape[0])
    if not request.padded:
        return places_A
    within_A = places_A - (counts_E.cumsum(0) - counts_E)[experts_A]
    padded_A = experts_A * request.expert_capacity + within_A
    return padded_A.masked_fill(within_A >= request.expert_capacity, -1)


def _index(request: RoutingRequest, copies_A: torch.Tensor, places_A: torch.Tensor) -> torch.Tensor:
    copies = request.expert_idx.numel()
    if request.row_idx_type == 0:
        index_F = torch.full((copies,), -1, dtype=torch.int32)
        index_F[copies_A] = places_A.to(torch.int32)
    else:
        index_F = unwritten((copies,), torch.int32)
        index_F[places_A] = copies_A.to(torch.int32)
    return index_F


def _move(
    request: RoutingRequest, copies_A: torch.Tensor, experts_A: torch.Tensor, places_A: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows at their places, and their scales."""
    rows = request.expert_num * request.expert_capacity if request.padded else request.rows
    inside_A = places_A < rows
    copies_A, experts_A, places_A = copies_A[inside_A], experts_A[inside_A], places_A[inside_A]
    tokens_A = copies_A // max(request.expert_idx.shape[1], 1)
    values_AH, scales_A = _quantise(request, tokens_A, experts_A)
    out = unwritten((rows, values_AH.shape[1]), values_AH.dtype)
    if request.padded:
        out.zero_()
    out[places_A] = values_AH
    scales = unwritten((rows,), torch.float32)
    if scales_A is not None:
        scales[places_A] = scales_A
    if request.padded:
        out = out.unflatten(0, (request.expert_num, request.expert_capacity))
    return out, scales


def _quantise(
    request: RoutingRequest, tokens_A: torch.Tensor, experts_A: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    rows_AH, scale, mode = request.x[tokens_A], request.scale, request.quant_mode
    if mode == UNQUANTISED:
        return rows_AH, None if scale is None else scale[tokens_A]
    rows_AH = rows_AH.float()
    if mode == STATIC:
        assert scale is not None and request.offset is not None, "check() saw to it"
        quantised_AH = (rows_AH * scale + request.offset).round().clamp(-128, 127)
        return quantised_AH.to(torch.int8), None
    if scale is not None:
        rows_AH = rows_AH * (scale if scale.shape[0] == 1 else scale[experts_A])
    largest = 127 if mode == DYNAMIC else 7
    scales_A = rows_AH.abs().amax(1) / largest
    # A row of zeros: the device divides zero by zero and makes zero of what is not a number.
    quantised_AH = (rows_AH / scales_A.unsqueeze(1)).nan_to_num(0.0).round().clamp(-128, 127)
    quantised_AH = quantised_AH.to(torch.int8)
    return quantised_AH if mode == DYNAMIC else _pack_bytes(quantised_AH), scales_A


def _pack_bytes(values: torch.Tensor) -> torch.Tensor:
    """Two int4 values a byte, the lower index in the lower four bits."""
    nibbles: torch.Tensor = values.view(torch.uint8).bitwise_and(0xF).unflatten(-1, (-1, 2))
    return nibbles[..., 0] + nibbles[..., 1] * 16


def _numbers(request: RoutingRequest, counts_E: torch.Tensor) -> torch.Tensor:
    """How many rows each expert has, in the form that was asked for."""
    pairs = request.expert_tokens_num_type == PAIRS
    shape = (request.expert_num, 2) if pairs else (request.end - request.start,)
    if not request.expert_tokens_num_flag and request.x.shape[0] > 0:
        return unwritten(shape, torch.int64)
    if pairs:
        numbers = torch.zeros(shape, dtype=torch.int64)
        busy_B = torch.nonzero(counts_E).flatten()
        numbers[: busy_B.shape[0], 0] = busy_B + request.start
        numbers[: busy_B.shape[0], 1] = counts_E[busy_B]
        return numbers
    return counts_E.cumsum(0) if request.expert_tokens_num_type == CUMULATIVE else counts_E


OPERATORS: Final[tuple[tuple[str, Callable[..., object]], ...]] = (
    (OPERATOR, npu_moe_init_routing_v2),
)
