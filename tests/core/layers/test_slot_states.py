"""A request finds in its slot what it left there, and nothing of who had the slot before."""

from __future__ import annotations

import pytest
import torch
from tests.fixtures.paged_models import CPU

from mortise.kv.recurrent import RecurrentPool
from mortise.layers.gated_delta_net import GatedDeltaState
from mortise.layers.paged_attention import BatchLayout
from mortise.layers.slot_states import SlotStates
from mortise.spec.roles import ForwardMode


@pytest.fixture
def pool() -> RecurrentPool:
    """Every element tells its layer and its slot."""
    pool = RecurrentPool(
        num_layers=2,
        num_slots=4,
        conv_rows=3,
        channels=5,
        num_heads=2,
        key_dim=3,
        value_dim=2,
        dtype=torch.bfloat16,
        device=CPU,
    )
    for layer in range(2):
        for slot in range(4):
            pool.conv(layer)[slot] = 10 * layer + slot
            pool.memory(layer)[slot] = 10 * layer + slot
    return pool


def layout(query: list[int], context: list[int], slots: list[int]) -> BatchLayout:
    pages: list[list[int]] = [[0]] * len(query)
    return BatchLayout.build(
        ForwardMode.PREFILL, query, context, pages, CPU, None, state_slots=slots
    )


def test_states_are_read_from_the_slots_of_the_requests(pool: RecurrentPool) -> None:
    state = SlotStates(pool, layout([1, 2], [7, 9], [3, 1])).read(1)
    assert state.conv.dtype == torch.bfloat16
    assert state.recurrent.dtype == torch.float32
    assert state.conv[:, 0, 0].tolist() == [13, 11]
    assert state.recurrent[:, 0, 0, 0].tolist() == [13, 11]


def test_a_request_begins_with_nothing(pool: RecurrentPool) -> None:
    pool.conv(0)[2], pool.memory(0)[2] = torch.nan, torch.nan
    state = SlotStates(pool, layout([4, 1], [4, 5], [2, 3])).read(0)
    assert not state.conv[0].any()
    assert not state.recurrent[0].any()
    assert (state.recurrent[1] == 3).all()


def test_what_is_kept_goes_to_the_own_slots_of_one_layer(pool: RecurrentPool) -> None:
    states = SlotStates(pool, layout([1, 1], [7, 9], [3, 0]))
    read = states.read(1)
    states.write(1, GatedDeltaState(conv=read.conv + 40, recurrent=read.recurrent + 40))
    assert pool.conv(1)[:, 0, 0].tolist() == [50, 11, 12, 53]
    assert pool.memory(1)[:, 0, 0, 0].tolist() == [50, 11, 12, 53]
    assert pool.memory(0)[:, 0, 0, 0].tolist() == [0, 1, 2, 3]


def test_what_was_read_is_a_copy(pool: RecurrentPool) -> None:
    state = SlotStates(pool, layout([1], [7], [3])).read(0)
    state.recurrent.zero_()
    assert (pool.memory(0)[3] == 3).all()


@pytest.mark.parametrize("slots", [[], [1], [1, 1]])
def test_every_request_needs_a_slot_of_its_own(pool: RecurrentPool, slots: list[int]) -> None:
    with pytest.raises(AssertionError, match="slot"):
        SlotStates(pool, layout([1, 1], [7, 9], slots))


def test_a_pass_without_requests(pool: RecurrentPool) -> None:
    states = SlotStates(pool, layout([], [], []))
    state = states.read(0)
    assert state.conv.shape == (0, 3, 5)
    states.write(0, state)
    assert pool.memory(0)[:, 0, 0, 0].tolist() == [0, 1, 2, 3]


def test_memory_is_what_the_tensors_take(pool: RecurrentPool) -> None:
    assert pool.num_bytes == 2 * 4 * (3 * 5 * 2 + 2 * 3 * 2 * 4)
