"""The arithmetic of DeepGEMM's products, and which rows of a grouped one belong to whom."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from mortise_cuda_common.emulator.deep_gemm.checks import poison, require
from mortise_cuda_common.emulator.deep_gemm.scales import COLUMNS, rows_of_groups

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mortise_cuda_common.emulator.deep_gemm.state import State

WARPGROUP_ROWS: Final = 64
"""Rows that one warpgroup of SM90 multiplies, or skips."""

OwnRows = tuple[torch.Tensor, int]
"""Rows of a tile, and the group whose weight they are multiplied by."""


def scaled_product(
    a_MK: torch.Tensor, scale_a: torch.Tensor, b_NK: torch.Tensor, scale_b: torch.Tensor
) -> torch.Tensor:
    """Multiply rows by rows, each 128 columns by themselves and then scaled.

    The sums of 128 products are added up in float32 under the product of their two scales, which
    is the promotion of SM90 and, for powers of two, what SM100 does within its tensor cores. The
    order within 128 columns is torch's: a chip has another and keeps fewer bits.

    Args:
        a_MK: e4m3 ``[M, K]``.
        scale_a: float32 ``[M, ceil(K/128)]``.
        b_NK: e4m3 ``[N, K]``.
        scale_b: float32 ``[N, ceil(K/128)]``.

    Returns:
        Float32 ``[M, N]``.
    """
    total = torch.zeros(a_MK.shape[0], b_NK.shape[0])
    for block in range(scale_a.shape[1]):
        columns = slice(block * COLUMNS, (block + 1) * COLUMNS)
        partial = a_MK[:, columns].float() @ b_NK[:, columns].float().T
        total += scale_a[:, block, None] * scale_b[None, :, block] * partial
    return total


def contiguous_rows(state: State, layout: torch.Tensor) -> Iterator[OwnRows]:
    """Rows by group as the kernels find them: by the first row of each tile, and no other.

    Rows whose own number is negative are multiplied as well where their tile is, and left out
    here: nothing defines what is in them.
    """
    numbers = layout.tolist()
    for start in range(0, len(numbers), state.alignment):
        group, stop = max(0, numbers[start]), min(start + state.alignment, len(numbers))
        rows = [
            row
            for row in range(start, stop)
            if numbers[row] >= 0 and _is_computed(state, numbers, start, row)
        ]
        if rows:
            yield torch.tensor(rows), group


def _is_computed(state: State, numbers: list[int], start: int, row: int) -> bool:
    """SM90 looks once more at the first row of each warpgroup; SM100 computes whole tiles."""
    if not state.is_sm90:
        return True
    return numbers[start + (row - start) // WARPGROUP_ROWS * WARPGROUP_ROWS] >= 0


def psum_rows(state: State, ends: torch.Tensor) -> Iterator[OwnRows]:
    """Rows by group where the layout holds the end of each."""
    start = 0
    for group, end in enumerate(ends.tolist()):
        if end > start:
            yield torch.arange(start, end), group
        start = -(-end // state.alignment) * state.alignment


def write_groups(
    out: torch.Tensor, rows: Iterator[OwnRows], product: Callable[[torch.Tensor, int], torch.Tensor]
) -> None:
    """Write the product of each group's rows, and poison everywhere else."""
    poison(out)
    for own, group in rows:
        out[own] = product(own, group).to(out.dtype)


def write_gaps(state: State, out: torch.Tensor, ends: torch.Tensor) -> None:
    """Zero the rows between groups, as ``ensure_zero_padding`` of the psum layout asks.

    The kernels of SM90 are never told of it: what is there is undefined.
    """
    if state.is_sm90:
        return
    last = -(-int(ends.max()) // state.alignment) * state.alignment
    inside = rows_of_groups(ends, out.shape[0], state.alignment)
    inside[last:] = True
    out[~inside] = 0


def require_masked_capacity(state: State, num_groups: int, capacity: int) -> None:
    """Refuse slots whose tiles would reach into the next group's rows.

    A tile is stored whole: in slots of fewer rows it is written over the rows of the next group,
    before or after those are (deepseek-ai/DeepGEMM#268). SM90 has tiles of 64 or 128 rows by a
    heuristic that no caller sees, so 128 is what can be relied on; SM100 has the alignment's.

    Raises:
        RuntimeError: the chip would give wrong numbers without a word.
    """
    tile = 2 * WARPGROUP_ROWS if state.is_sm90 else state.alignment
    require(
        num_groups == 1 or capacity % tile == 0,
        f"slots of {capacity} rows are no multiple of the {tile} rows of a tile, whose last rows"
        " would be written over those of the next group (deepseek-ai/DeepGEMM#268)",
    )
