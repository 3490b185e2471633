"""Rows moved apart so that every group begins where a kernel needs it to, and their way back."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from mortise_cuda_common.row_owners import owners_of

if TYPE_CHECKING:
    from mortise_cuda_common.groups import Groups
    from mortise_cuda_common.rows import Rows


@dataclass(frozen=True, slots=True)
class Arrangement:
    """The move of R rows to R' places.

    Args:
        groups: of the rows once they were moved.
        sources: int64 ``[R']``, the row that comes to each place; any row where none does.
        places: int64 ``[R]``, where each row went; any place for rows of no group.
    """

    groups: Groups
    sources: torch.Tensor
    places: torch.Tensor

    def apply(self, rows: Rows) -> Rows:
        """The rows at their new places; gaps hold rows of anybody, to be read by nobody."""
        # Scales are gathered column by column, the layout in which kernels load them.
        scales = None if rows.scales is None else _gather(rows.scales.T, self.sources, 1).T
        return replace(rows, values=_gather(rows.values, self.sources, 0), scales=scales)

    def undo(self, results: torch.Tensor) -> torch.Tensor:
        """Results ``[R', N]`` at the places that their rows had before, ``[R, N]``."""
        return results.index_select(0, self.places)


def arrangement(groups: Groups, multiple: int) -> Arrangement | None:
    """Move groups to multiples of a number of rows.

    Args:
        groups: where they are.
        multiple: where each must begin; masked rows get slots of a multiple of it.

    Returns:
        The move, or None where everything is in place already.
    """
    held = groups.alignment if groups.capacity is None else groups.capacity
    if held % multiple == 0:
        return None
    apart = _apart(groups, multiple)
    before, after = owners_of(groups), owners_of(apart)
    sources = groups.first_rows[after.groups] + after.places
    places = apart.first_rows[before.groups] + before.places
    return Arrangement(
        groups=apart,
        sources=sources.masked_fill(~after.are_rows, 0),
        places=places.masked_fill(~before.are_rows, 0),
    )


def _apart(groups: Groups, multiple: int) -> Groups:
    if groups.capacity is not None:
        capacity = _up(groups.capacity, multiple)
        numbers = torch.arange(
            groups.num_groups, dtype=groups.counts.dtype, device=groups.counts.device
        )
        return replace(
            groups,
            first_rows=numbers * capacity,
            num_rows=groups.num_groups * capacity,
            capacity=capacity,
        )
    padded = (groups.counts + (multiple - 1)) // multiple * multiple
    first_rows = padded.cumsum(0) - padded
    return replace(
        groups,
        first_rows=first_rows.to(groups.first_rows.dtype),
        num_rows=_most_rows(groups, multiple),
        alignment=multiple,
    )


def _most_rows(groups: Groups, multiple: int) -> int:
    """Rows once padded, or no fewer where the host does not know the counts."""
    if groups.host_counts is not None:
        # Never none: where no group has a row, the old places still need one to take back.
        return max(multiple, sum(_up(count, multiple) for count in groups.host_counts))
    most_groups = min(groups.num_rows, groups.num_groups)
    return (groups.num_rows + most_groups * (multiple - 1)) // multiple * multiple


def _up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def _gather(tensor: torch.Tensor, index: torch.Tensor, dim: int) -> torch.Tensor:
    """Select, float8 as its bytes."""
    if tensor.element_size() > 1:
        return tensor.index_select(dim, index)
    return tensor.view(torch.uint8).index_select(dim, index).view(tensor.dtype)
