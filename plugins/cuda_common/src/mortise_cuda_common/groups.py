"""Which rows belong to which local expert, in every layout that rows arrive in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from mortise.plugin import GroupListKind, RowLayout

if TYPE_CHECKING:
    from mortise.plugin import DispatchedTokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Groups:
    """One group of rows for each local expert, in rows that are seen as one flat ``[R, ...]``.

    Masked rows ``[E_l, capacity, ...]`` are seen as flat ones in which group e begins at row
    ``e * capacity``. Rows of no group are undefined and are never read as numbers.

    Args:
        first_rows: int32 ``[E_l]``, first row of each group, on the device, ascending.
        counts: int32 ``[E_l]``, valid rows of each group, on the device.
        num_rows: R, rows of no group included.
        alignment: every group begins at a multiple of it.
        capacity: rows of each group's slot where rows are masked, else None.
        host_counts: the counts where the host knows them.
    """

    first_rows: torch.Tensor
    counts: torch.Tensor
    num_rows: int
    alignment: int = 1
    capacity: int | None = None
    host_counts: tuple[int, ...] | None = None

    @classmethod
    def of(cls, tokens: DispatchedTokens) -> Groups:
        """Groups of dispatched rows that the consumer check let through; nothing waits."""
        layout, capacity = tokens.format.row_layout, None
        counts = tokens.group_list
        if tokens.group_list_kind is GroupListKind.CUMULATIVE:
            counts = torch.diff(counts, prepend=counts.new_zeros(1))
        alignment = 1
        if layout is RowLayout.MASKED:
            capacity = tokens.rows.shape[1]
            first_rows = torch.arange(counts.shape[0], device=counts.device) * capacity
        else:
            if layout is RowLayout.GROUPED_ALIGNED:
                alignment = tokens.format.alignment
            padded = (counts + alignment - 1) // alignment * alignment
            first_rows = padded.cumsum(0) - padded
        return cls(
            first_rows=first_rows.to(torch.int32),
            counts=counts.to(torch.int32),
            num_rows=tokens.rows.shape[:-1].numel(),
            alignment=alignment,
            capacity=capacity,
            host_counts=tokens.group_counts,
        )

    @classmethod
    def single(cls, num_rows: int, device: torch.device) -> Groups:
        """One group of all rows."""
        return cls(
            first_rows=torch.zeros(1, dtype=torch.int32, device=device),
            counts=torch.full((1,), num_rows, dtype=torch.int32, device=device),
            num_rows=num_rows,
            host_counts=(num_rows,),
        )

    @property
    def num_groups(self) -> int:
        """E_l."""
        return self.counts.shape[0]

    def most_tiles(self, block_rows: int) -> int:
        """No fewer tiles of ``block_rows`` rows than the groups have, without asking the device."""
        if self.capacity is not None:
            return self.num_groups * -(-self.capacity // block_rows)
        return min(self.num_rows, self.num_rows // block_rows + self.num_groups)
