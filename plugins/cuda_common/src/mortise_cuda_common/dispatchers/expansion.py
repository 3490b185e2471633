"""Received rows, one for each token and rank, as rows of each local expert."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

NO_ROW = -1


@dataclass(frozen=True, slots=True)
class Expansion:
    """Where the row of every choice lies: by local expert, then received row, then choice.

    Args:
        sources: int64 ``[R]``, the received row that comes to each place; any where none does.
        row_of_NK: int32 ``[N, K]``, the row of each choice, -1 where it has none.
    """

    sources: torch.Tensor
    row_of_NK: torch.Tensor

    def apply(self, received: torch.Tensor) -> torch.Tensor:
        """Rows ``[N, ...]`` at all of their places, ``[R, ...]``; gaps are to be read by nobody."""
        if received.element_size() > 1:
            return received.index_select(0, self.sources)
        # float8 cannot be selected by index.
        return received.view(torch.uint8).index_select(0, self.sources).view(received.dtype)

    def apply_to_scales(self, received: torch.Tensor) -> torch.Tensor:
        """Scales ``[N, S]`` at all of their places, column after column, as products load them."""
        return received.T.index_select(1, self.sources).T


def expansion(local_ids_NK: torch.Tensor, counts: Sequence[int], alignment: int) -> Expansion:
    """Give every choice of a local expert its row; nothing waits for the device.

    Args:
        local_ids_NK: int64, local experts; -1 is none.
        counts: rows of each expert, as the host knows them.
        alignment: each expert's rows begin at a multiple of it.
    """
    device, num_choices = local_ids_NK.device, local_ids_NK.shape[1]
    padded = [-(-count // alignment) * alignment for count in counts]
    # No expert sorts last, behind every group.
    group_of_choice = torch.where(local_ids_NK < 0, len(counts), local_ids_NK).flatten()
    choices = group_of_choice.argsort(stable=True)[: sum(counts)]
    numbers = torch.tensor([list(counts), padded], dtype=torch.int64, device=device)
    # Of each group: how far its place is from the number of its row among all.
    shifts = (numbers[1] - numbers[0]).cumsum(0) - (numbers[1] - numbers[0])
    rows = torch.arange(sum(counts), device=device) + shifts[group_of_choice[choices]]
    sources = torch.zeros(sum(padded), dtype=torch.int64, device=device)
    sources.index_copy_(0, rows, choices // max(num_choices, 1))
    row_of_choice = torch.full_like(group_of_choice, NO_ROW)
    row_of_choice.index_copy_(0, choices, rows)
    return Expansion(sources, row_of_choice.view(local_ids_NK.shape).to(torch.int32))
