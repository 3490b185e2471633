"""The pages of a pass's requests as a tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence


class PageTables:
    """Makes a table anew only when a request came, went or took a page.

    Args:
        device: where tables are.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._page_lists: list[list[int]] = []
        self._table = torch.empty(0, 0, dtype=torch.int32, device=device)

    def of(self, page_lists: Sequence[list[int]]) -> torch.Tensor:
        """int32 ``[B, pages]``, short rows filled up with page 0."""
        if page_lists != self._page_lists:
            width = max(map(len, page_lists), default=0)
            table = [[*pages, *[0] * (width - len(pages))] for pages in page_lists]
            self._table = torch.tensor(table, dtype=torch.int32, device=self._device).view(
                len(page_lists), width
            )
            self._page_lists = [list(pages) for pages in page_lists]
        return self._table
