"""DeepGEMM's scores of query rows against the keys of their pages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from mortise_cuda_common.emulator.deep_gemm.checks import (
    device_fault,
    poisoned,
    require,
    require_dtype,
    shape_of,
)
from mortise_cuda_common.emulator.deep_gemm.mqa import require_query, scores
from mortise_cuda_common.emulator.deep_gemm.paged_schedule import SPLIT, num_atoms
from mortise_cuda_common.emulator.deep_gemm.paged_walk import sm90_walk, sm100_walk

if TYPE_CHECKING:
    from mortise_cuda_common.emulator.deep_gemm.paged_walk import Task
    from mortise_cuda_common.emulator.deep_gemm.state import State

SCALE_BYTES: Final = 4


def paged_logits(
    state: State,
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    weights: torch.Tensor,
    context_lens: torch.Tensor,
    block_table: torch.Tensor,
    schedule_meta: torch.Tensor,
    max_context_len: int,
    clean_logits: bool,
    indices: torch.Tensor | None,
) -> torch.Tensor:
    """``scale_j * sum_h relu(q_h . k_j) * weight_h`` for every visible key j of every query row.

    Args:
        state: the library.
        q: e4m3 ``[B, next_n, H, D]``.
        kv_cache: uint8 ``[P, block, 1, D + 4]``: within a page all keys, then all scales.
        weights: float32 ``[B * next_n, H]``.
        context_lens: int32 ``[B, next_n]``; the last column is a request's.
        block_table: int32 ``[B, pages]``.
        schedule_meta: int32 ``[num_sms + 1, 2]``.
        max_context_len: columns of the result.
        clean_logits: refused, as lengths of two dimensions are not cleaned.
        indices: None.

    Returns:
        Float32 ``[B * next_n, max_context_len]`` whose rows are further apart than they are long;
        columns from a row's length on, and all that no multiprocessor comes to, are poison.

    Raises:
        RuntimeError: an assertion of the library, a page that is not there, or a multiprocessor
            that would never end.
    """
    batch, next_n, heads, dim = shape_of(q, 4)
    require_query(state, q, heads, dim)
    keys, scale = _fused(state, kv_cache, dim)
    _require_rows(q, weights, context_lens, block_table)
    require(indices is None, "no indices: rows of varying numbers of queries are not emulated")
    _require_schedule(state, schedule_meta)
    require(not state.is_sm90 or next_n in (1, 2), "next_n == 1 or next_n == 2")
    require(not clean_logits, "not is_context_lens_2d")

    columns = -(-max_context_len // SPLIT) * SPLIT
    logits = poisoned((batch * next_n, columns), torch.float32)[:, :max_context_len]
    lens = context_lens.tolist()
    last = [row[-1] for row in lens]
    # Cast once: every task of a request reads the same query, and requests may share pages.
    q, named = q.float(), _named_pages(block_table, keys.shape[0])
    named_keys = keys[named].float()
    for task in _tasks(state, schedule_meta, last, next_n, heads):
        start = task.first_split * SPLIT
        stop = min(start + task.num_splits * SPLIT, last[task.request], max_context_len)
        if stop <= start:
            continue
        pages, places = _positions(block_table[task.request], start, stop, keys)
        key = named_keys[torch.searchsorted(named, pages), places]
        key_scale = scale[pages, places]
        for draft, length in enumerate(lens[task.request]):
            row, seen = task.request * next_n + draft, min(stop, length) - start
            if seen > 0:
                found = scores(q[task.request, draft, None], key, key_scale, weights[row, None])
                logits[row, start : start + seen] = found[0, :seen]
    return logits


def _require_rows(
    q: torch.Tensor, weights: torch.Tensor, context_lens: torch.Tensor, block_table: torch.Tensor
) -> None:
    """What comes with the query has its rows."""
    batch, next_n, heads, _ = q.shape
    require(weights.is_contiguous(), "weights.is_contiguous()")
    require(
        shape_of(weights, 2) == (batch * next_n, heads),
        "_batch_size_next_n == batch_size * next_n and _num_heads == num_heads",
    )
    require_dtype(weights, torch.float32)
    require(shape_of(block_table, 2)[0] == batch, "_batch_size == batch_size")
    require(block_table.stride(1) == 1, "block_table.stride(1) == 1")
    require_dtype(block_table, torch.int32)
    require(context_lens.dim() == 2, "context_lens.dim() == 2")
    require(
        tuple(context_lens.shape) == (batch, next_n),
        "batch_size == __batch_size and next_n == _next_n",
    )
    require(context_lens.is_contiguous(), "context_lens.is_contiguous()")
    require_dtype(context_lens, torch.int32)


def _fused(state: State, kv_cache: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys e4m3 ``[P, block, D]`` and scales float32 ``[P, block]`` of fused pages."""
    pages, block, heads, width = shape_of(kv_cache, 4)
    require(
        block == 64 or (block == 32 and not state.is_sm90),
        "(arch_major == 10 and (block_kv == 32 or block_kv == 64)) or (arch_major == 9 and"
        " block_kv == 64)",
    )
    require(
        heads == 1 and width == dim + SCALE_BYTES,
        "num_heads_kv == 1 and head_dim_with_sf == head_dim + static_cast<int>(sizeof(float))",
    )
    require(
        kv_cache.stride(1) == width and kv_cache.stride(3) == 1,
        "fused_kv_cache.stride(1) == head_dim_with_sf and fused_kv_cache.stride(3) == 1",
    )
    require_dtype(kv_cache, torch.uint8)
    page_bytes = kv_cache.stride(0)
    require(page_bytes % SCALE_BYTES == 0, "kv_cache_stride_bytes % sizeof(float) == 0")
    page = kv_cache.as_strided((pages, block * width), (page_bytes, 1)).contiguous()
    keys = page[:, : block * dim].contiguous().view(torch.float8_e4m3fn)
    scale = page[:, block * dim :].contiguous().view(torch.float32)
    return keys.reshape(pages, block, dim), scale


def _named_pages(block_table: torch.Tensor, num_pages: int) -> torch.Tensor:
    """The pages that there are of those that the block table names, in their order."""
    pages: torch.Tensor = torch.unique(block_table).long()
    return pages[(pages >= 0) & (pages < num_pages)]


def _require_schedule(state: State, schedule: torch.Tensor) -> None:
    require(
        shape_of(schedule, 2) == (state.num_sms + 1, 2),
        f"_schedule_meta_size == num_sms + 1 and _meta_info_size == 2: {tuple(schedule.shape)},"
        f" num_sms is {state.num_sms}",
    )
    require(schedule.is_contiguous(), "schedule_meta.is_contiguous()")
    require_dtype(schedule, torch.int32)


def _tasks(
    state: State, schedule: torch.Tensor, lens: list[int], next_n: int, heads: int
) -> list[Task]:
    """What all multiprocessors compute; whether each of them ends is known before any writes."""
    entries = [(first, second) for first, second in schedule.tolist()]
    tasks: list[Task] = []
    for sm in range(state.num_sms):
        if state.is_sm90:
            tasks += sm90_walk(entries, lens, num_atoms(next_n), sm)
        else:
            tasks += sm100_walk(entries, lens, next_n, heads, sm)
    return tasks


def _positions(
    table: torch.Tensor, start: int, stop: int, keys: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Page and place in it of the tokens from ``start`` to before ``stop``."""
    tokens = torch.arange(start, stop)
    block = keys.shape[1]
    if (stop - 1) // block >= table.shape[0]:
        raise device_fault(f"token {stop - 1} is in no page: a row has {table.shape[0]} pages")
    pages = table[tokens // block].long()
    if bool((pages < 0).any() | (pages >= keys.shape[0]).any()):
        raise device_fault(f"the block table names pages that are not among {keys.shape[0]}")
    return pages, tokens % block
