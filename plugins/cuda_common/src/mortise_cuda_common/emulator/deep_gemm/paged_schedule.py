"""The schedule of paged scores: where in the work each multiprocessor begins, as DeepGEMM plans."""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING, Final

import torch

from mortise_cuda_common.emulator.deep_gemm.checks import device_fault, require, require_dtype

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mortise_cuda_common.emulator.deep_gemm.state import State

SPLIT: Final = 256
"""Tokens of one unit of work."""

WARP: Final = 32
BYTES_OF_SUM: Final = 4

Entry = tuple[int, int]
"""Where a multiprocessor begins: an atom of query rows (SM90) or a query row (SM100), a split."""


def plan(
    state: State,
    context_lens: torch.Tensor,
    block_kv: int,
    num_sms: int,
    indices: torch.Tensor | None,
) -> torch.Tensor:
    """Int32 ``[num_sms + 1, 2]`` of int32 lengths ``[B, next_n]``, of which the last column counts.

    Raises:
        RuntimeError: the library's assertions, or its fault where SM90 is given zeros alone.
    """
    require(context_lens.dim() == 2, "context_lens.dim() == 2")
    require_dtype(context_lens, torch.int32)
    require(context_lens.is_contiguous(), "context_lens.is_contiguous()")
    require(indices is None, "no indices: rows of varying numbers of queries are not emulated")
    blocks = (64,) if state.is_sm90 else (32, 64)
    require(block_kv in blocks, " or ".join(f"block_kv == {size}" for size in blocks))
    _require_memory(state, context_lens.shape[0])
    lens, next_n = context_lens[:, -1].tolist(), context_lens.shape[1]
    entries = (sm90_entries if state.is_sm90 else sm100_entries)(lens, next_n, num_sms)
    return torch.tensor(entries, dtype=torch.int32)


def _require_memory(state: State, rows: int) -> None:
    """The sums of all requests lie in the memory of one block."""
    sums = -(-rows // WARP) * WARP if state.is_sm90 else 2 * rows
    fits = sums * BYTES_OF_SUM <= state.chip.shared_memory
    require(fits, f"smem_size <= smem_capacity: {rows} requests")


def num_atoms(next_n: int) -> int:
    """Pairs of query rows in a request on SM90, the last one of one row where they are odd."""
    return -(-next_n // 2) if next_n >= 2 else 1


def num_splits(length: int) -> int:
    """Units of work in so many tokens."""
    return -(-length // SPLIT)


def sm90_entries(lens: Sequence[int], next_n: int, num_sms: int) -> list[Entry]:
    """Equal shares of (atom, split), the last multiprocessors taking one more.

    Raises:
        RuntimeError: all lengths are 0 and their number is a multiple of 32: the search then reads
            behind its prefix sums.
    """
    splits, atoms = [num_splits(length) for length in lens], num_atoms(next_n)
    before = [0, *accumulate(count * atoms for count in splits)]
    share, extra = divmod(before[-1], num_sms)
    if before[-1] == 0 and len(lens) % WARP == 0:
        raise device_fault(
            f"an illegal memory access was encountered: {len(lens)} lengths, and all are 0"
        )
    entries = []
    for sm in range(num_sms):
        start = sm * share + max(0, sm - (num_sms - extra))
        request = 0
        while request < len(lens) and before[request + 1] <= start:
            request += 1
        # Without any work the search ends behind the requests, in padding of zeros.
        count = splits[request] if request < len(lens) else 0
        atom, split = divmod(start - before[request], count) if count else (0, 0)
        entries.append((request * atoms + atom, split))
    return [*entries, (len(lens) * atoms, 0)]


def sm100_entries(lens: Sequence[int], next_n: int, num_sms: int) -> list[Entry]:
    """Equal shares of splits weighted by query rows, begun at whole splits of a request.

    The first multiprocessors take one more. A split of a request is never divided among its query
    rows: the entry names the first of them.
    """
    before = [0, *accumulate(num_splits(length) * next_n for length in lens)]
    share, extra = divmod(before[-1], num_sms)
    entries = []
    for sm in range(num_sms + 1):
        start = sm * share + min(sm, extra)
        request = 0
        while request < len(lens) and before[request + 1] <= start:
            request += 1
        if request == len(lens):
            entries.append((len(lens) * next_n, 0))
        else:
            entries.append((request * next_n, (start - before[request]) // next_n))
    return entries
