"""Whatever is taken and given back in whatever order, every slot has one owner or is free."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mortise.errors import CapacityError
from mortise.kv.slots import SlotAllocator


@given(st.integers(1, 5), st.lists(st.integers(-1, 4), max_size=30))
def test_a_slot_has_one_owner(num_slots: int, steps: list[int]) -> None:
    """A step of -1 takes a slot, any other gives one of those that are held back."""
    slots, held = SlotAllocator(num_slots), []
    for step in steps:
        if step >= 0:
            if held:
                slots.release(held.pop(step % len(held)))
        elif len(held) == num_slots:
            with pytest.raises(CapacityError, match=f"all {num_slots} slots"):
                slots.allocate()
        else:
            held.append(slots.allocate())
        assert len(set(held)) == len(held)
        assert slots.num_free == num_slots - len(held)
        slots.check_integrity(held)


@pytest.mark.parametrize("slot", [-1, 0, 2])
def test_giving_back_what_nobody_holds_is_noticed(slot: int) -> None:
    slots = SlotAllocator(2)
    slots.release(slots.allocate())
    with pytest.raises(AssertionError, match=r"nobody holds|no such slot"):
        slots.release(slot)


def test_a_lost_slot_is_noticed() -> None:
    slots = SlotAllocator(2)
    slots.allocate()
    with pytest.raises(AssertionError, match="lost"):
        slots.check_integrity([])
