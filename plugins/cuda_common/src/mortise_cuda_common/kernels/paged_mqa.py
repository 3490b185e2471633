"""The launches of the programs that score cached index keys, and how they are compiled."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from mortise.plugin import SPLIT_TOKENS
from mortise_cuda_common.chip import Architecture
from mortise_cuda_common.kernels.paged_mqa_kernel import paged_mqa_kernel
from mortise_cuda_common.kernels.paged_mqa_query_kernel import paged_mqa_query_kernel
from mortise_cuda_common.programs.base import CompileCase

if TYPE_CHECKING:
    from mortise.plugin import IndexKeyPages
    from mortise_cuda_common.programs.base import Programs

SMALLEST_AMAX: Final = 1e-4
"""Heads of zeros, or nearly so, are scaled as if this was their largest magnitude (DeepGEMM)."""

COLUMN_MULTIPLE: Final = 64
"""Rows of scores are as many columns wide, so that they can be stored 16 bytes at a time."""

BLOCK_KEYS: Final = 128
NUM_WARPS: Final = 8
NUM_STAGES: Final = 5
"""Two of them are the pages' own way to the keys: 32 KiB of float8 keys are under way at a time."""


def quantise_queries(
    programs: Programs, query_TND: torch.Tensor, weights_TN: torch.Tensor, num_heads: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise each head of each query to e4m3, and fold its scale into its weight.

    Args:
        programs: what runs it.
        query_TND: bfloat16 or float32 ``[T, N, D]``.
        weights_TN: float32 ``[T, N]``.
        num_heads: N or more; further heads are zeros.

    Returns:
        e4m3 ``[T, num_heads, D]`` and float32 ``[T, num_heads]``.
    """
    query_TND = query_TND if query_TND.stride(-1) == 1 else query_TND.contiguous()
    weights_TN = weights_TN if weights_TN.stride(-1) == 1 else weights_TN.contiguous()
    tokens, heads, dim = query_TND.shape
    values = query_TND.new_empty(tokens, num_heads, dim, dtype=torch.float8_e4m3fn)
    folded = weights_TN.new_empty(tokens, num_heads)
    programs.launch(
        paged_mqa_query_kernel,
        tokens,
        (query_TND, weights_TN, values, folded),
        {
            "QUERY_STRIDE": query_TND.stride(0),
            "HEAD_STRIDE": query_TND.stride(1),
            "WEIGHT_STRIDE": weights_TN.stride(0),
            **_query_constants(heads, num_heads, dim),
        },
        num_warps=NUM_WARPS,
    )
    return values, folded


def score(
    programs: Programs,
    query_TND: torch.Tensor,
    key_pages: IndexKeyPages,
    weights_TN: torch.Tensor,
    page_table: torch.Tensor,
    lens: torch.Tensor,
    schedule: torch.Tensor,
    logits: torch.Tensor,
    entry_tokens: int = 1,
) -> None:
    """Score cached keys, one program for each worker of the schedule.

    Args:
        programs: what runs it.
        query_TND: contiguous ``[T, N, D]`` of the dtype of the keys.
        key_pages: cached keys, with scales where they are quantised.
        weights_TN: float32 ``[T, N]``, contiguous; the scales of queries are folded in.
        page_table: int32 ``[requests, pages]``.
        lens: int32 ``[rows, tokens]``, contiguous, what the schedule was made from; as many rows
            of each request, and T = rows * tokens.
        schedule: int32 ``[workers + 1, 2]``, contiguous.
        logits: float32 ``[T, C]``, contiguous: the result. C had better be a multiple of
            COLUMN_MULTIPLE; columns past a row's length, and keys past C, are left alone.
        entry_tokens: what the first number of an entry is divided by for its row of lengths.
    """
    heads, dim = query_TND.shape[1:]
    rows, tokens = lens.shape
    keys, scales = key_pages.keys, key_pages.scales
    programs.launch(
        paged_mqa_kernel,
        schedule.shape[0] - 1,
        (
            *(query_TND, keys, weights_TN if scales is None else scales, weights_TN),
            *(lens, page_table, schedule, logits),
            *(logits.shape[1], page_table.stride(0)),
        ),
        {
            "PAGE_STRIDE": keys.stride(0),
            "KEY_STRIDE": keys.stride(1),
            "SCALE_STRIDE": 0 if scales is None else scales.stride(0),
            "TOKENS": tokens,
            "ENTRY_TOKENS": entry_tokens,
            "TABLE_ROWS": rows // page_table.shape[0],
            "PAGE_SIZE": keys.shape[1],
            **_constants(heads, dim, is_quantised=scales is not None),
        },
        num_warps=NUM_WARPS,
        num_stages=NUM_STAGES,
    )


def _constants(heads: int, dim: int, *, is_quantised: bool) -> dict[str, int | float | bool]:
    # Matrix units multiply no fewer than 16 heads, and 32 numbers of float8 at a time.
    return {
        "HEADS": heads,
        "DIM": dim,
        "QUANTISED": is_quantised,
        "SPLIT": SPLIT_TOKENS,
        "BLOCK_KEYS": BLOCK_KEYS,
        "HEAD_BLOCK": max(_power_of_two(heads), 16),
        "DIM_BLOCK": max(_power_of_two(dim), 32),
    }


def _query_constants(heads: int, num_heads: int, dim: int) -> dict[str, int | float | bool]:
    return {
        "SMALLEST_AMAX": SMALLEST_AMAX,
        "HEADS": heads,
        "PADDED_HEADS": num_heads,
        "DIM": dim,
        "HEAD_BLOCK": _power_of_two(num_heads),
        "DIM_BLOCK": _power_of_two(dim),
    }


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _case(keys: str, heads: int, dim: int, tokens: int = 1) -> CompileCase:
    is_quantised = keys == "fp8e4nv"
    columns = max(_power_of_two(heads), 16)
    wgmma = "k32.f32.e4m3.e4m3" if is_quantised else "k16.f32.bf16.bf16"
    tcgen05 = rf"tcgen05\.mma\.cta_group::1\.kind::{'f8f6f4' if is_quantised else 'f16'}"
    pointers = {
        "queries": f"*{keys}",
        "keys": f"*{keys}",
        "key_scales": "*fp32",
        "weights": "*fp32",
        "lens": "*i32",
        "page_table": "*i32",
        "schedule": "*i32",
        "logits": "*fp32",
    }
    block = 64
    return CompileCase(
        name=f"index scores of {heads} heads x {dim} over {keys} keys, {tokens} tokens a row",
        source=paged_mqa_kernel,
        signature={**pointers, "num_columns": "i32", "table_pitch": "i32"},
        constants={
            "PAGE_STRIDE": block * (dim + 4) if is_quantised else block * dim,
            "KEY_STRIDE": dim,
            "SCALE_STRIDE": block * (dim + 4) // 4 if is_quantised else 0,
            "TOKENS": tokens,
            "ENTRY_TOKENS": 1,
            "TABLE_ROWS": 1,
            "PAGE_SIZE": block,
            **_constants(heads, dim, is_quantised=is_quantised),
        },
        architectures=tuple(Architecture),
        num_warps=NUM_WARPS,
        num_stages=NUM_STAGES,
        instructions={
            Architecture.SM90: rf"wgmma\.mma_async\.sync\.aligned\.m64n{columns}{wgmma}",
            Architecture.SM100: tcgen05,
            Architecture.SM103: tcgen05,
        },
    )


def _query_case(heads: int, num_heads: int, dim: int) -> CompileCase:
    pointers = {"queries": "*bf16", "weights": "*fp32", "values": "*fp8e4nv", "folded": "*fp32"}
    return CompileCase(
        name=f"quantised index queries of {heads} heads x {dim}, padded to {num_heads}",
        source=paged_mqa_query_kernel,
        signature=pointers,
        constants={
            "QUERY_STRIDE": heads * dim,
            "HEAD_STRIDE": dim,
            "WEIGHT_STRIDE": heads,
            **_query_constants(heads, num_heads, dim),
        },
        architectures=tuple(Architecture),
        num_warps=NUM_WARPS,
    )


CASES: Final = (
    _case("fp8e4nv", 64, 128),
    _case("fp8e4nv", 64, 128, tokens=2),
    _case("fp8e4nv", 4, 64),
    _case("bf16", 64, 128),
    _case("bf16", 32, 128),
    _case("bf16", 4, 32),
    _query_case(64, 64, 128),
    _query_case(4, 32, 64),
)
"""DeepSeek-V3.2 has 64 heads x 128, smaller models fewer; the programs are launched in all ways."""
