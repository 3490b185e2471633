"""Whatever is taken and given back in whatever order, every page has one owner or is free."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from mortise.errors import CapacityError
from mortise.kv.pages import PAGE_SIZE, PageAllocator, pages_for

NUM_PAGES = 11


class Allocation(RuleBasedStateMachine):
    """Requests come, grow by pages, give some or all back, and ask for too much."""

    held = Bundle("held")

    def __init__(self) -> None:
        super().__init__()
        self.allocator = PageAllocator(NUM_PAGES)
        self.owned: list[list[int]] = []

    @rule(target=held, count=st.integers(0, NUM_PAGES + 2))
    def take(self, count: int) -> list[int]:
        free = self.allocator.num_free
        if count > free:
            with pytest.raises(CapacityError, match=f"{count} cache pages wanted, {free} of"):
                self.allocator.allocate(count)
            assert self.allocator.num_free == free, "none or all"
            return []
        pages = self.allocator.allocate(count)
        assert len(pages) == len(set(pages)) == count
        assert not set(pages) & {page for own in self.owned for page in own}
        assert self.allocator.num_free == free - count
        self.owned.append(pages)
        return pages

    @rule(pages=consumes(held))
    def give_all_back(self, pages: list[int]) -> None:
        if any(own is pages for own in self.owned):
            self.allocator.release(list(pages))
            self.owned = [own for own in self.owned if own is not pages]

    @rule(pages=held, data=st.data())
    def give_one_back(self, pages: list[int], data: st.DataObject) -> None:
        if pages and any(own is pages for own in self.owned):
            page = data.draw(st.sampled_from(pages))
            self.allocator.release([page])
            pages.remove(page)

    @rule(page=st.integers(0, NUM_PAGES - 1))
    def giving_back_what_nobody_holds_is_noticed(self, page: int) -> None:
        if not any(page in own for own in self.owned):
            with pytest.raises(AssertionError, match="nobody holds"):
                self.allocator.release([page])

    @rule(pages=held)
    def giving_back_twice_is_noticed(self, pages: list[int]) -> None:
        if pages and any(own is pages for own in self.owned):
            with pytest.raises(AssertionError, match="twice"):
                self.allocator.release([pages[0], pages[0]])

    @invariant()
    def every_page_has_one_owner(self) -> None:
        self.allocator.check_integrity(self.owned)
        assert self.allocator.num_free == NUM_PAGES - sum(map(len, self.owned))


TestAllocation = Allocation.TestCase


def test_integrity_means_every_page_once() -> None:
    allocator = PageAllocator(3)
    pages = allocator.allocate(2)
    allocator.check_integrity([pages[:1], pages[1:]])
    for wrong in ([], [pages, pages[:1]], [[*pages, 2]], [pages[:1]]):
        with pytest.raises(AssertionError, match="lost or held twice"):
            allocator.check_integrity(wrong)


def test_no_pages_are_legal() -> None:
    allocator = PageAllocator(0)
    assert allocator.allocate(0) == []
    with pytest.raises(CapacityError, match="1 cache pages wanted, 0 of 0 free"):
        allocator.allocate(1)


@pytest.mark.parametrize(
    ("tokens", "pages"), [(0, 0), (1, 1), (63, 1), (64, 1), (65, 2), (128, 2), (129, 3)]
)
def test_tokens_in_pages(tokens: int, pages: int) -> None:
    assert PAGE_SIZE == 64
    assert pages_for(tokens) == pages
