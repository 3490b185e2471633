"""Which group each row belongs to, found on the device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from mortise_cuda_common.groups import Groups


@dataclass(frozen=True, slots=True)
class Owners:
    """Of flat rows ``[R]``.

    Args:
        groups: int64, the last group that begins at or before each row.
        places: int64, how far behind the beginning of that group it is.
        are_rows: bool, whether it is a row of that group and not of the gap behind it.
    """

    groups: torch.Tensor
    places: torch.Tensor
    are_rows: torch.Tensor


def owners_of(groups: Groups) -> Owners:
    """The owner of every row; nothing waits for the device."""
    rows = torch.arange(groups.num_rows, dtype=torch.int32, device=groups.counts.device)
    # Empty groups begin where the next one does: the last of those that begin there owns the rows.
    owners = torch.searchsorted(groups.first_rows, rows, right=True) - 1
    places = rows - groups.first_rows[owners]
    return Owners(owners, places.long(), places < groups.counts[owners])
