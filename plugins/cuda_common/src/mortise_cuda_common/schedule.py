"""How DeepGEMM shares the work of paged index scores among streaming multiprocessors."""

# Both generations cut each row of lengths into splits of 256 keys and give worker s the splits
# from entry s of the schedule up to entry s + 1. A worker does not count: it steps until its
# cursor meets the next entry, by lengths that it reads again. Lengths other than those that were
# planned with can let it step over its end, and it never stops. The walks below are the kernels'
# own steps, and raise there. Sources: DeepGEMM 2.6.1,
# deep_gemm/include/deep_gemm/scheduler/sm90_paged_mqa_logits.cuh and sm100_paged_mqa_logits.cuh.

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple, NoReturn

import torch

from mortise.plugin import SPLIT_TOKENS, ReasonCode, StaleScheduleError

if TYPE_CHECKING:
    from collections.abc import Iterator


class Task(NamedTuple):
    """Keys ``[256 * split, 256 * split + 256)`` of the queries that begin at ``token``.

    On SM90 a task is at most two tokens of a row of lengths, on SM100 all of them.
    """

    token: int
    split: int


def sm90_schedule(lens_RN: torch.Tensor, num_workers: int) -> torch.Tensor:
    """Share as evenly as possible, the remainder to the last workers.

    Args:
        lens_RN: int32 ``[rows, next_n]``, at least 1 each; the last column counts, as it is the
            longest of its row.
        num_workers: at least 1.

    Returns:
        int32 ``[num_workers + 1, 2]`` on the device of the lengths, without waiting for it: pairs
        of (pair of tokens, split), numbered through all rows; the last is one past all.
    """
    rows, next_n = lens_RN.shape
    atoms = (next_n + 1) // 2
    splits_R = _splits(lens_RN)
    ends_R = (splits_R * atoms).cumsum(0)
    workers = torch.arange(num_workers, device=lens_RN.device)
    share, rest = _shares(ends_R, num_workers)
    starts = workers * share + (workers - (num_workers - rest)).clamp(min=0)
    row, offset = _locate(ends_R, starts)
    # A row past the last has no splits; it has no offset to divide either.
    splits = torch.cat([splits_R, splits_R.new_ones(1)]).clamp(min=1)[row]
    entries = torch.stack([row * atoms + offset // splits, offset % splits], dim=1)
    return torch.cat([entries, _one_past(entries, rows * atoms)]).to(torch.int32)


def sm100_schedule(lens_RN: torch.Tensor, num_workers: int) -> torch.Tensor:
    """Share splits times tokens, the remainder to the first workers, cut between splits.

    Args:
        lens_RN: as :func:`sm90_schedule` takes them.
        num_workers: at least 1.

    Returns:
        int32 ``[num_workers + 1, 2]`` likewise: pairs of (first token of a row, split).
    """
    next_n = lens_RN.shape[1]
    ends_R = (_splits(lens_RN) * next_n).cumsum(0)
    workers = torch.arange(num_workers + 1, device=lens_RN.device)
    share, rest = _shares(ends_R, num_workers)
    row, offset = _locate(ends_R, workers * share + torch.minimum(workers, rest))
    return torch.stack([row * next_n, offset // max(next_n, 1)], dim=1).to(torch.int32)


def sm90_walk(schedule: torch.Tensor, lens_RN: torch.Tensor) -> Iterator[list[Task]]:
    """Yield the tasks of each worker, in the order in which an SM90 does them.

    Args:
        schedule: int32 ``[num_workers + 1, 2]``.
        lens_RN: int32 ``[rows, next_n]``, the lengths that the kernel reads.

    Raises:
        StaleScheduleError: a worker would never meet its end, or read past the last row.
    """
    next_n = lens_RN.shape[1]
    atoms = (next_n + 1) // 2
    # Not zero: a row without keys is a task as well, of garbage.
    splits_R = _splits(lens_RN).clamp(min=1).tolist()
    for worker, (cursor, end) in enumerate(_spans(schedule)):
        tasks = []
        while cursor != end:
            atom, split = cursor
            row = atom // max(atoms, 1)
            if cursor > end or row >= len(splits_R):
                _never_ends(worker, cursor, end, len(splits_R))
            tasks.append(Task(row * next_n + atom % atoms * 2, split))
            cursor = (atom, split + 1) if split + 1 < splits_R[row] else (atom + 1, 0)
        yield tasks


def sm100_walk(schedule: torch.Tensor, lens_RN: torch.Tensor) -> Iterator[list[Task]]:
    """Yield the tasks of each worker, in the order in which an SM100 does them.

    Args:
        schedule: int32 ``[num_workers + 1, 2]``.
        lens_RN: int32 ``[rows, next_n]``, the lengths that the kernel reads.

    Raises:
        StaleScheduleError: a worker would count its splits below zero, which are four billion; or
            16 of no row, where tokens and heads take several tiles.
    """
    rows, next_n = lens_RN.shape
    splits_R = _splits(lens_RN).tolist()
    for worker, ((token, split), end) in enumerate(_spans(schedule)):
        tasks = []
        while token < rows * next_n and not (token == end[0] and split >= end[1]):
            upper = end[1] if token == end[0] else splits_R[token // next_n]
            if split > upper:
                _never_ends(worker, (token, split), end, rows)
            tasks += [Task(token, each) for each in range(split, upper)]
            if token == end[0]:
                break
            token, split = token + next_n, 0
        yield tasks


def _splits(lens_RN: torch.Tensor) -> torch.Tensor:
    """int64 ``[rows]``: splits of each row."""
    if not lens_RN.shape[1]:
        return lens_RN.new_zeros(lens_RN.shape[0], dtype=torch.int64)
    return (lens_RN[:, -1].long() + SPLIT_TOKENS - 1) // SPLIT_TOKENS


def _shares(ends_R: torch.Tensor, num_workers: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Work of each worker, and how many of them have one unit more."""
    total = ends_R[-1:].sum()
    return total // num_workers, total % num_workers


def _locate(ends_R: torch.Tensor, starts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The row that each unit of work belongs to, and its number within the row."""
    row = torch.searchsorted(ends_R, starts, right=True)
    return row, starts - torch.cat([ends_R.new_zeros(1), ends_R])[row]


def _one_past(entries: torch.Tensor, num_atoms: int) -> torch.Tensor:
    last = entries.new_zeros(1, 2)
    last[0, 0] = num_atoms
    return last


def _spans(schedule: torch.Tensor) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    return pairwise((first, second) for first, second in schedule.tolist())


def _never_ends(worker: int, cursor: tuple[int, int], end: tuple[int, int], rows: int) -> NoReturn:
    raise StaleScheduleError(
        f"worker {worker} of a paged index launch over {rows} rows stands at {cursor} and would "
        f"never meet its end {end}",
        reason=ReasonCode.CONTRACT_BROKEN,
        expected="the lengths that the schedule was made from",
        remedy="plan once for each pass, and launch with the metadata of that plan",
    )
