"""Rows put in the order of their experts, and experts' results put back: the first generation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from mortise_npu_ascend.emulator.chip import current_chip
from mortise_npu_ascend.emulator.generation import Generation
from mortise_npu_ascend.emulator.poison import poison_value, unwritten
from mortise_npu_ascend.emulator.rejections import device_name, reject, require

if TYPE_CHECKING:
    from collections.abc import Callable

FLOAT_ROWS: Final = (torch.float16, torch.bfloat16, torch.float32)
_MOST_EXPERTS: Final = 2048

_INIT: Final = "npu_moe_init_routing"
_COUNT: Final = "npu_moe_compute_expert_tokens"
_FINALIZE: Final = "npu_moe_finalize_routing"
_FINALIZE_KERNEL: Final = "aclnnMoeFinalizeRoutingV2"


def npu_moe_init_routing(
    x: torch.Tensor, row_idx: torch.Tensor, expert_idx: torch.Tensor, active_num: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Copy each row once for each of its experts, ordered by expert, ties in the order of tokens.

    Args:
        x: ``[T, H]``, float16, bfloat16 or float32.
        row_idx: int32 ``[T, K]``; ``arange(T * K).reshape(K, T).T`` numbers the copies column after
            column, and everything that is indexed by them afterwards is ``[K * T]``.
        expert_idx: int32 ``[T, K]``.
        active_num: tokens' worth of rows that are wanted.

    Returns:
        Rows ``[min(active_num, T) * K, H]``; int32 ``[K * T]``, the place of each copy in the
        order; int32 ``[T * K]``, the experts in order.

    Raises:
        RuntimeError: what the device refuses.
    """
    _check_init(x, row_idx, expert_idx, active_num)
    tokens, top_k = expert_idx.shape
    experts_F = expert_idx.flatten()
    order_F = torch.argsort(experts_F, stable=True)
    copies_F = row_idx.flatten()[order_F].long()
    places_F = unwritten(copies_F.shape, torch.int32)
    places_F[copies_F] = torch.arange(tokens * top_k, dtype=torch.int32)
    rows = min(active_num, tokens) * top_k
    return x[copies_F[:rows] % max(tokens, 1)], places_F, experts_F[order_F]


def _check_init(
    x: torch.Tensor, row_idx: torch.Tensor, expert_idx: torch.Tensor, active_num: int
) -> None:
    require(x.ndim == 2, _INIT, "The x should be 2D")
    require(
        x.dtype in FLOAT_ROWS,
        _INIT,
        f"float16, float32 or bfloat16 tensor expected but got a tensor with dtype: {x.dtype}",
    )
    for name, index in (("expert_idx", expert_idx), ("row_idx", row_idx)):
        require(index.ndim == 2, _INIT, f"The {name} should be 2D")
        require(
            index.dtype == torch.int32,
            _INIT,
            f"int32 tensor expected but got a tensor with dtype: {index.dtype} ({name})",
        )
    require(active_num >= 0, _INIT, "The active_num must be a non-negative number")
    require(x.shape[0] == expert_idx.shape[0], _INIT, "Input rows should be same.")
    require(
        expert_idx.shape == row_idx.shape,
        _INIT,
        "The shape of expert_idx and row_idx should be same.",
    )


def npu_moe_compute_expert_tokens(
    sorted_expert_for_source_row: torch.Tensor, num_expert: int
) -> torch.Tensor:
    """Where the rows of each expert end: the cumulative list of groups, but int32.

    Args:
        sorted_expert_for_source_row: int32 ``[F]``, ascending.
        num_expert: 1 to 2048.

    Returns:
        int32 ``[num_expert]``; a grouped product wants it as int64.

    Raises:
        RuntimeError: what the device refuses.
    """
    kernel = "aclnnMoeComputeExpertTokens"
    experts_F = sorted_expert_for_source_row
    require(
        experts_F.dtype == torch.int32,
        _COUNT,
        f"sortedExperts should be DT_INT32, got {device_name(experts_F.dtype)}",
        kernel=kernel,
    )
    require(experts_F.ndim == 1, _COUNT, "sortedExperts should be 1D", kernel=kernel)
    require(
        0 < num_expert <= _MOST_EXPERTS,
        _COUNT,
        f"numExperts {num_expert} should be in (0, {_MOST_EXPERTS}]",
        kernel=kernel,
    )
    experts_E = torch.arange(num_expert, dtype=torch.int32)
    return torch.searchsorted(experts_F.contiguous(), experts_E, right=True, out_int32=True)


def npu_moe_finalize_routing(
    expanded_permuted_rows: torch.Tensor,
    skip1: torch.Tensor | None,
    skip2: torch.Tensor | None,
    bias: torch.Tensor | None,
    scales: torch.Tensor | None,
    expanded_src_to_dst_row: torch.Tensor,
    export_for_source_row: torch.Tensor | None,
    drop_pad_mode: int | None = 0,
    k: int | None = 1,
) -> torch.Tensor:
    """``out[i] = skip1[i] + skip2[i] + sum_j scales[i, j] * (rows[place(i, j)] + bias[expert])``.

    Args:
        expanded_permuted_rows: ``[F, H]``, or ``[E, C, H]`` in modes 1 and 3.
        skip1: ``[T, H]``, or None.
        skip2: as ``skip1``; only together with it.
        bias: ``[E, H]``, or None.
        scales: ``[T, K]`` in the dtype of the rows, or float32; None for ones.
        expanded_src_to_dst_row: int32 ``[T * K]``: ``place(i, j)`` is its element ``j * T + i`` in
            modes 0 and 1 (of ``npu_moe_init_routing``), ``i * K + j`` in modes 2 and 3 (of
            ``npu_moe_init_routing_v2``). -1 adds nothing in modes 1 and 3. In modes 0 and 2 an
            index outside the rows adds nothing on A5 and anything at all on A2 and A3, which is
            not a number here.
        export_for_source_row: int32 ``[T, K]``, the expert of each copy; needed with ``bias``.
        drop_pad_mode: 0 to 3; None is 0.
        k: K where ``scales`` is None.

    Returns:
        ``[T, H]`` in the dtype of the rows: summed in float32, rounded once.

    Raises:
        RuntimeError: what the device refuses.
    """
    mode = drop_pad_mode or 0
    top_k = scales.shape[1] if scales is not None and scales.ndim == 2 else k or 1
    rows, places_F = expanded_permuted_rows, expanded_src_to_dst_row
    _check_finalize(rows, skip1, skip2, bias, scales, places_F, export_for_source_row, mode, top_k)
    tokens = places_F.shape[0] // top_k
    rows_FH = rows.flatten(0, -2).float()
    places_TK = places_F.view(top_k, tokens).T if mode in (0, 1) else places_F.view(tokens, top_k)
    out_TH = torch.zeros(tokens, rows_FH.shape[1])
    for skip in (skip1, skip2):
        out_TH += 0 if skip is None else skip.float()
    for slot in range(top_k):
        there_T = (places_TK[:, slot] >= 0) & (places_TK[:, slot] < rows_FH.shape[0])
        added_SH = rows_FH[places_TK[there_T, slot]]
        if bias is not None and export_for_source_row is not None:
            added_SH = added_SH + bias.float()[export_for_source_row[there_T, slot]]
        if scales is not None:
            added_SH = added_SH * scales[there_T, slot].float().unsqueeze(1)
        out_TH[there_T] += added_SH
        if not _skips_missing_rows(mode):
            out_TH[~there_T] = poison_value(out_TH.dtype)
    return out_TH.to(rows.dtype)


def _skips_missing_rows(mode: int) -> bool:
    return mode in (1, 3) or current_chip().generation is Generation.A5


def _check_finalize(
    rows: torch.Tensor,
    skip1: torch.Tensor | None,
    skip2: torch.Tensor | None,
    bias: torch.Tensor | None,
    scales: torch.Tensor | None,
    places_F: torch.Tensor,
    experts_TK: torch.Tensor | None,
    mode: int,
    top_k: int,
) -> None:
    def need(condition: bool, reason: str) -> None:
        require(condition, _FINALIZE, reason, kernel=_FINALIZE_KERNEL)

    need(0 <= mode <= 3, f"dropPadMode {mode} should be in [0, 3]")
    wanted = 3 if mode in (1, 3) else 2
    need(rows.ndim == wanted, f"expandedX should be {wanted}D in dropPadMode {mode}")
    need(rows.dtype in FLOAT_ROWS, f"expandedX cannot be {device_name(rows.dtype)}")
    need(
        places_F.dtype == torch.int32 and places_F.ndim == 1,
        f"expandedRowIdx should be DT_INT32 and 1D, got {device_name(places_F.dtype)}",
    )
    need(places_F.shape[0] % top_k == 0, f"expandedRowIdx is no multiple of K {top_k}")
    out_shape = (places_F.shape[0] // top_k, rows.shape[-1])
    need(skip1 is not None or skip2 is None, "x2Optional cannot be given without x1Optional")
    for name, skip in (("x1Optional", skip1), ("x2Optional", skip2)):
        need(skip is None or skip.shape == out_shape, f"{name} should have the shape of out")
        need(skip is None or skip.dtype == rows.dtype, f"{name} should have the dtype of expandedX")
    need(bias is None or bias.dtype == rows.dtype, "bias should have the dtype of expandedX")
    need(bias is None or experts_TK is not None, "biasOptional needs expertIdxOptional")
    need(
        experts_TK is None or experts_TK.dtype == torch.int32,
        "expertIdxOptional should be DT_INT32",
    )
    if scales is not None:
        need(scales.shape == (out_shape[0], top_k), "scalesOptional should be (NUM_ROWS, K)")
        _check_scales(rows.dtype, scales.dtype)


def _check_scales(rows: torch.dtype, scales: torch.dtype) -> None:
    """The manual of the library; torch_npu's own, older one knows only equal dtypes."""
    mixed = rows == torch.bfloat16 and scales == torch.float32
    if current_chip().generation is Generation.A5:
        mixed = scales in FLOAT_ROWS
    if rows != scales and not mixed:
        reject(
            _FINALIZE,
            f"scalesOptional {device_name(scales)} does not go with expandedX {device_name(rows)}",
            kernel=_FINALIZE_KERNEL,
        )


OPERATORS: Final[tuple[tuple[str, Callable[..., object]], ...]] = (
    (_INIT, npu_moe_init_routing),
    (_COUNT, npu_moe_compute_expert_tokens),
    (_FINALIZE, npu_moe_finalize_routing),
)
