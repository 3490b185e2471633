"""How DeepGEMM's kernels go through their shares of paged scores, and whether they find the end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from mortise_cuda_common.emulator.deep_gemm.checks import device_fault
from mortise_cuda_common.emulator.deep_gemm.paged_schedule import SPLIT, num_splits

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mortise_cuda_common.emulator.deep_gemm.paged_schedule import Entry

BLOCK: Final = 64
"""Tokens of a page on SM90."""

BLOCKS_OF_SPLIT: Final = SPLIT // BLOCK

TILE_ROWS: Final = 128
"""Query rows times heads of one tile on SM100."""

SPLITS_OF_CHUNK: Final = 16
"""Splits that SM100 goes through for one tile of query rows before it turns to the next."""


@dataclass(frozen=True, slots=True)
class Task:
    """Scores of some query rows of one request for some splits of its keys.

    Args:
        request: whose keys.
        first_split: where the keys begin.
        num_splits: how many splits of them.
    """

    request: int
    first_split: int
    num_splits: int


def sm90_walk(entries: Sequence[Entry], lens: Sequence[int], atoms: int, sm: int) -> Iterator[Task]:
    """What one multiprocessor of SM90 computes, split by split.

    It stops where its cursor equals the next entry, and nowhere else; how many blocks a request has
    it counts from the lengths of the launch.

    Args:
        entries: the schedule.
        lens: the length of each request at the launch.
        atoms: atoms of a request.
        sm: which multiprocessor.

    Raises:
        RuntimeError: it steps over its end: on a chip it would run on for ever.
    """
    (atom, split), end = entries[sm], entries[sm + 1]
    block, end_block = split * BLOCKS_OF_SPLIT, end[1] * BLOCKS_OF_SPLIT
    if (atom, block) == (end[0], end_block):
        return
    num_blocks = _num_blocks(lens, atom // atoms, sm)
    while (atom, block) != (end[0], end_block):
        if (atom, block) > (end[0], end_block):
            raise _endless(sm, end)
        yield Task(atom // atoms, block // BLOCKS_OF_SPLIT, 1)
        block += BLOCKS_OF_SPLIT
        if block >= num_blocks:
            atom, block = atom + 1, 0
            is_mine = (atom, 0) < (end[0], end_block)
            if atom % atoms == 0 and is_mine:
                num_blocks = _num_blocks(lens, atom // atoms, sm)


def sm100_walk(
    entries: Sequence[Entry], lens: Sequence[int], next_n: int, heads: int, sm: int
) -> Iterator[Task]:
    """What one multiprocessor of SM100 computes, request by request.

    It stops within the request of the next entry. Where it begins behind the last split of its own
    request, what is left is a negative number of splits, which it takes for 4 billion; where the
    query rows take several tiles it takes 16 of them and goes on.

    Args:
        entries: the schedule.
        lens: the length of each request at the launch.
        next_n: query rows of a request.
        heads: of a query row.
        sm: which multiprocessor.

    Raises:
        RuntimeError: so many splits: on a chip it would run on for ever.
    """
    (row, split), end = entries[sm], entries[sm + 1]
    if row >= len(lens) * next_n or (row == end[0] and split >= end[1]):
        return
    has_one_tile = next_n * heads <= TILE_ROWS
    for request in range(row // next_n, len(lens)):
        is_last = request * next_n == end[0]
        stop = end[1] if is_last else num_splits(lens[request])
        if is_last and stop == 0 and request * next_n != row:
            return
        if stop < split and has_one_tile:
            raise _endless(sm, end)
        yield Task(request, split, stop - split if stop >= split else SPLITS_OF_CHUNK)
        split = 0
        if is_last:
            return


def _num_blocks(lens: Sequence[int], request: int, sm: int) -> int:
    if request >= len(lens):
        raise device_fault(
            f"multiprocessor {sm} begins at request {request} of {len(lens)} and would never end"
        )
    return -(-lens[request] // BLOCK)


def _endless(sm: int, end: Entry) -> RuntimeError:
    return device_fault(
        f"multiprocessor {sm} would never end: the lengths at the launch are not those of the"
        f" schedule, and it steps over {end}, where it should stop"
    )
