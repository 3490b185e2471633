"""Which pages of the cache are free and which request holds which."""

from __future__ import annotations

from mortise.errors import CapacityError

PAGE_SIZE = 64
"""Tokens per page."""


class PageAllocator:
    """Hands out pages; a page belongs to one owner until it is given back.

    Args:
        num_pages: pages there are, numbered from 0.
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._held: set[int] = set()

    @property
    def num_free(self) -> int:
        """Pages nobody holds."""
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Take ``count`` pages, all or none.

        Raises:
            CapacityError: fewer are free.
        """
        assert count >= 0
        if count > len(self._free):
            raise CapacityError(
                f"{count} cache pages wanted, {len(self._free)} of {self.num_pages} free",
                remedy="raise cache.max_num_tokens, or run fewer or shorter requests at once",
            )
        taken = self._free[len(self._free) - count :]
        del self._free[len(self._free) - count :]
        self._held.update(taken)
        return taken[::-1]

    def release(self, pages: list[int]) -> None:
        """Give pages back; all of them are held, and none is named twice."""
        returned = set(pages)
        assert len(returned) == len(pages), "a page is given back twice"
        assert returned <= self._held, "a page is given back that nobody holds"
        self._held -= returned
        self._free.extend(reversed(pages))

    def check_integrity(self, held: list[list[int]]) -> None:
        """Assert that every page is free or held by exactly one of ``held``."""
        everything = sorted([*self._free, *(page for pages in held for page in pages)])
        assert everything == list(range(self.num_pages)), "pages lost or held twice"


def pages_for(num_tokens: int) -> int:
    """Pages that ``num_tokens`` tokens need."""
    return -(-num_tokens // PAGE_SIZE)
