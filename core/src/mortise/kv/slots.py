"""Which request holds which slot of a pool that keeps one state for each running request."""

from __future__ import annotations

from mortise.errors import CapacityError


class SlotAllocator:
    """Hands out slots; a slot belongs to one owner until it is given back.

    Args:
        num_slots: slots there are, numbered from 0.
    """

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self._free = list(range(num_slots - 1, -1, -1))

    @property
    def num_free(self) -> int:
        """Slots nobody holds."""
        return len(self._free)

    def allocate(self) -> int:
        """Take a slot.

        Raises:
            CapacityError: none is free.
        """
        if not self._free:
            raise CapacityError(
                f"all {self.num_slots} slots for the states of requests are taken",
                remedy="raise scheduler.max_num_seqs, or run fewer requests at once",
            )
        return self._free.pop()

    def release(self, slot: int) -> None:
        """Give a slot back, which is held."""
        assert 0 <= slot < self.num_slots, "there is no such slot"
        assert slot not in self._free, "a slot is given back that nobody holds"
        self._free.append(slot)

    def check_integrity(self, held: list[int]) -> None:
        """Assert that every slot is free or held by exactly one of ``held``."""
        assert sorted([*self._free, *held]) == list(range(self.num_slots)), (
            "slots lost or held twice"
        )
