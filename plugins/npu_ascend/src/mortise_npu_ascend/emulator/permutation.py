"""Rows sorted by expert without any counting, sorted back, and regrouped after an exchange."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from mortise_npu_ascend.emulator.chip import current_chip
from mortise_npu_ascend.emulator.generation import Generation
from mortise_npu_ascend.emulator.poison import poison_value, unwritten
from mortise_npu_ascend.emulator.rejections import device_name, require
from mortise_npu_ascend.emulator.routing import FLOAT_ROWS

if TYPE_CHECKING:
    from collections.abc import Callable

_INDEX_DTYPES: Final = (torch.int32, torch.int64)
_WIDEST_ROW: Final = 16384

_PERMUTE: Final = "npu_moe_token_permute"
_UNPERMUTE: Final = "npu_moe_token_unpermute"
_RE_ROUTE: Final = "npu_moe_re_routing"


def npu_moe_token_permute(
    tokens: torch.Tensor,
    indices: torch.Tensor,
    num_out_tokens: int | None = None,
    padded_mode: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Copy each row once for each of its experts, ordered by expert, ties in the order of tokens.

    Args:
        tokens: ``[T, H]``.
        indices: int32 or int64 ``[T, K]`` or ``[T]``, the experts.
        num_out_tokens: rows that are wanted; None and 0 for all, negative for all but so many.
        padded_mode: False.

    Returns:
        Rows ``[R, H]``, and int32 ``[T * K]``: the place of each copy in the order, which is the
        inverse of the permutation and may lie beyond R.

    Raises:
        RuntimeError: what the device refuses.
    """
    _check_permute(tokens, indices, padded_mode)
    copies = indices.numel()
    wanted = num_out_tokens or 0
    rows = min(wanted, copies) if wanted > 0 else copies + wanted
    require(rows >= 0, _PERMUTE, f"num_out_tokens {wanted} of {copies} leaves no row")
    order_F = torch.argsort(indices.flatten(), stable=True)
    places_F = torch.empty(copies, dtype=torch.int32)
    places_F[order_F] = torch.arange(copies, dtype=torch.int32)
    top_k = indices.shape[1] if indices.ndim == 2 else 1
    return tokens[order_F[:rows] // top_k], places_F


def _check_permute(tokens: torch.Tensor, indices: torch.Tensor, padded_mode: bool) -> None:
    def need(condition: bool, reason: str) -> None:
        require(condition, _PERMUTE, reason, kernel="aclnnMoeTokenPermute")

    need(tokens.ndim == 2, f"The dims of input tokens should be 2 dimensional, got {tokens.ndim}")
    need(indices.ndim in (1, 2), f"The dims of input indices should be 2 or 1, got {indices.ndim}")
    need(indices.dtype in _INDEX_DTYPES, f"indices cannot be {device_name(indices.dtype)}")
    rows: tuple[torch.dtype, ...] = FLOAT_ROWS
    if current_chip().generation is Generation.A5:
        rows = (*FLOAT_ROWS, torch.int8)
    need(tokens.dtype in rows, f"tokens cannot be {device_name(tokens.dtype)}")
    need(indices.shape[0] == tokens.shape[0], "tokens and indices should have as many rows")
    need(not padded_mode, "paddedMode only supports false")


def npu_moe_token_unpermute(
    permuted_tokens: torch.Tensor,
    sorted_indices: torch.Tensor,
    probs: torch.Tensor | None = None,
    padded_mode: bool = False,
    restore_shape: list[int] | None = None,
) -> torch.Tensor:
    """``out[i] = sum_j permuted_tokens[sorted_indices[i * K + j]] * probs[i, j]``.

    A place beyond the rows, or with a probability of 0, is not read and adds nothing. A negative
    one with another probability is read from before the rows: not a number here.

    Args:
        permuted_tokens: ``[R, H]``.
        sorted_indices: int32 or int64 ``[T * K]``, of :func:`npu_moe_token_permute`.
        probs: ``[T, K]``; None for K = 1 and ones.
        padded_mode: False.
        restore_shape: read in padded mode only.

    Returns:
        ``[T, H]`` in the dtype of the rows: summed in float32, rounded once.

    Raises:
        RuntimeError: what the device refuses.
    """
    _check_unpermute(permuted_tokens, sorted_indices, probs, padded_mode)
    top_k = 1 if probs is None else probs.shape[1]
    places_TK = sorted_indices.view(-1, top_k)
    probs_TK = torch.ones(places_TK.shape) if probs is None else probs.float()
    out_TH = torch.zeros(places_TK.shape[0], permuted_tokens.shape[1])
    for slot in range(top_k):
        read_T = (places_TK[:, slot] < permuted_tokens.shape[0]) & (probs_TK[:, slot] != 0)
        rows_SH = permuted_tokens[places_TK[read_T, slot].clamp(min=0)].float()
        rows_SH[places_TK[read_T, slot] < 0] = poison_value(rows_SH.dtype)
        out_TH[read_T] += rows_SH * probs_TK[read_T, slot].unsqueeze(1)
    return out_TH.to(permuted_tokens.dtype)


def _check_unpermute(
    rows: torch.Tensor, places: torch.Tensor, probs: torch.Tensor | None, padded_mode: bool
) -> None:
    def need(condition: bool, reason: str) -> None:
        require(condition, _UNPERMUTE, reason, kernel="aclnnMoeTokenUnpermute")

    if probs is not None:
        need(probs.ndim == 2, f"The dims of input probs should be 2 dimensional, got {probs.ndim}")
        need(probs.dtype in FLOAT_ROWS, f"probs cannot be {device_name(probs.dtype)}")
        need(probs.numel() == places.numel(), "probs and sorted_indices should be as many")
    need(rows.ndim == 2, f"The dims of input permuted_tokens should be 2, got {rows.ndim}")
    need(places.ndim == 1, f"The dims of input sorted_indices should be 1, got {places.ndim}")
    need(rows.dtype in FLOAT_ROWS, f"permutedTokens cannot be {device_name(rows.dtype)}")
    need(places.dtype in _INDEX_DTYPES, f"sortedIndices cannot be {device_name(places.dtype)}")
    need(not padded_mode, "paddedMode only supports false")


def npu_moe_re_routing(
    tokens: torch.Tensor,
    expert_token_num_per_rank: torch.Tensor,
    *,
    per_token_scales: torch.Tensor | None = None,
    expert_token_num_type: int = 1,
    idx_type: int = 0,
    tokens_dtype: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Regroup rows that lie rank after rank so that they lie expert after expert.

    Args:
        tokens: ``[A, H]``; of each rank the rows of expert 0, of expert 1, and so on.
        expert_token_num_per_rank: int32 or int64 ``[ranks, E]``.
        per_token_scales: float32 ``[A]``, moved with the rows; None leaves its result unwritten.
        expert_token_num_type: 1, counts.
        idx_type: 0, the source of each place; on A5 also 1, the place of each source.
        tokens_dtype: None; what it asks for is not emulated.

    Returns:
        Rows ``[A, H]``, their scales, int32 ``[A]`` the index, and ``[E]`` the rows of each expert.
        What lies beyond the counted rows is unwritten.

    Raises:
        RuntimeError: what the device refuses.
    """
    counts_RE = expert_token_num_per_rank
    _check_re_routing(
        tokens, counts_RE, per_token_scales, expert_token_num_type, idx_type, tokens_dtype
    )
    experts_E = torch.arange(counts_RE.shape[1]).repeat(counts_RE.shape[0])
    expert_A = torch.repeat_interleave(experts_E, counts_RE.flatten().long())
    source_A = torch.argsort(expert_A, stable=True)
    total = source_A.shape[0]
    rows = unwritten(tokens.shape, tokens.dtype)
    rows[:total] = tokens[source_A]
    scales = unwritten((tokens.shape[0],), torch.float32)
    if per_token_scales is not None:
        scales[:total] = per_token_scales[source_A]
    index_A = unwritten((tokens.shape[0],), torch.int32)
    index_A[:total] = (source_A if idx_type == 0 else torch.argsort(source_A)).to(torch.int32)
    return rows, scales, index_A, counts_RE.sum(0, dtype=counts_RE.dtype)


def _check_re_routing(
    tokens: torch.Tensor,
    counts_RE: torch.Tensor,
    scales: torch.Tensor | None,
    number_type: int,
    index_type: int,
    tokens_dtype: int | None,
) -> None:
    def need(condition: bool, reason: str) -> None:
        require(condition, _RE_ROUTE, reason, kernel="aclnnMoeReRouting")

    need(tokens.ndim > 1, "tokens dim should larger than 1")
    need(counts_RE.ndim > 1, "expert_token_num_per_rank dim should larger than 1")
    need(tokens_dtype is None, f"tokens_dtype {tokens_dtype} is not emulated")
    need(
        tokens.dtype in (torch.float16, torch.bfloat16, torch.int8),
        f"tokens cannot be {device_name(tokens.dtype)}",
    )
    need(
        counts_RE.dtype in _INDEX_DTYPES,
        f"expert_token_num_per_rank cannot be {device_name(counts_RE.dtype)}",
    )
    need(
        scales is None or (scales.dtype == torch.float32 and scales.shape == tokens.shape[:1]),
        "per_token_scales should be DT_FLOAT and one per token",
    )
    need(number_type == 1, f"expert_token_num_type {number_type} should be 1")
    indices = (0, 1) if current_chip().generation is Generation.A5 else (0,)
    need(index_type in indices, f"idx_type {index_type} should be in {indices}")
    need(tokens.shape[1] < _WIDEST_ROW, f"H {tokens.shape[1]} should be less than {_WIDEST_ROW}")
    total = int(counts_RE.sum())
    need(
        total <= tokens.shape[0],
        f"expert_token_num_per_rank counts {total} of {tokens.shape[0]} tokens",
    )


OPERATORS: Final[tuple[tuple[str, Callable[..., object]], ...]] = (
    (_PERMUTE, npu_moe_token_permute),
    (_UNPERMUTE, npu_moe_token_unpermute),
    (_RE_ROUTE, npu_moe_re_routing),
)
