"""What a schedule of the indexer covers, read from the form that the contract describes."""

from __future__ import annotations

from itertools import pairwise

import torch

from mortise.spec.paged_mqa import SPLIT_TOKENS


def schedule_problem(
    schedule: torch.Tensor | None,
    planned_lens: torch.Tensor | None,
    lens: torch.Tensor,
    num_workers: int,
) -> str:
    """What a schedule leaves out or does twice; nothing where it cannot be read, or is right.

    Only int32 ``[num_workers + 1, 2]`` can be read: worker s has the units of 256 keys from entry
    s up to entry s + 1, an entry is (row, unit within the row), the last is (number of rows, 0).
    A plan of another form belongs to its backend, and is judged by the scores.

    Args:
        schedule: the backend's.
        planned_lens: the lengths that it divides up, where they are not the true ones.
        lens: int32 ``[rows, next_n]``, the true ones.
        num_workers: among whom.
    """
    if schedule is None or tuple(schedule.shape) != (num_workers + 1, 2):
        return ""
    planned = lens if planned_lens is None else planned_lens.cpu()
    if planned.numel() != lens.numel() or lens.shape[1] != 1:
        return ""
    units = (planned.flatten().clamp(min=1).long() + SPLIT_TOKENS - 1) // SPLIT_TOKENS
    entries = schedule.cpu().long().tolist()
    before = torch.cat([units.new_zeros(1), units.cumsum(0)]).tolist()
    if entries[-1] != [len(units), 0]:
        return f"the schedule ends at {entries[-1]}, not at {[len(units), 0]}"
    if any(not 0 <= row <= len(units) for row, _ in entries):
        return "the schedule names a row that is not there"
    places = [before[row] + unit for row, unit in entries]
    if places[0] != 0:
        return f"the schedule begins at {entries[0]}, and leaves out what is before"
    steps = [end - start for start, end in pairwise(places)]
    if min(steps) < 0:
        worker = steps.index(min(steps))
        return f"worker {worker} of the schedule ends before it begins: {entries[worker]}"
    return ""
