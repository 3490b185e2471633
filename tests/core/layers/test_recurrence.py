"""Slots move past the accepted tokens of a request and past no other, whatever was drafted."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.fixtures.gated_delta_nets import (
    HIDDEN,
    LAYERS,
    WIDTH,
    hidden_of,
    layer_of,
    new_state,
    shape_of,
    their_layer,
)
from tests.fixtures.paged_models import CPU

from mortise.kv.recurrent import RecurrentPool
from mortise.layers.paged_attention import BatchLayout
from mortise.layers.recurrence import MovedStates, VerifiedStates
from mortise.layers.sequences import Sequences
from mortise.spec.roles import ForwardMode

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mortise.layers.gated_delta_net import GatedDeltaNet, Recur
    from mortise.spec.qkv import QKVLayout

NUM_LAYERS, NUM_SLOTS = 2, 4
TOLERANCE = 1e-5


@cache
def nets(layout: QKVLayout, heads: str) -> tuple[GatedDeltaNet, ...]:
    shape = shape_of(layout, heads)
    return tuple(
        layer_of(shape, their_layer(shape, seed=index).state_dict(), index)
        for index in range(NUM_LAYERS)
    )


def pool_of(layers: Sequence[GatedDeltaNet]) -> RecurrentPool:
    """Slots in which all that nobody wrote is NaN."""
    state = new_state(layers[0])
    _, heads, key_dim, value_dim = state.recurrent.shape
    pool = RecurrentPool(
        num_layers=len(layers),
        num_slots=NUM_SLOTS,
        conv_rows=WIDTH - 1,
        channels=state.conv.shape[-1],
        num_heads=heads,
        key_dim=key_dim,
        value_dim=value_dim,
        dtype=state.conv.dtype,
        device=CPU,
    )
    for layer in range(len(layers)):
        pool.conv(layer).fill_(torch.nan)
        pool.memory(layer).fill_(torch.nan)
    return pool


def copy_of(pool: RecurrentPool) -> list[torch.Tensor]:
    return [
        tensor.clone()
        for layer in range(pool.num_layers)
        for tensor in (pool.conv(layer), pool.memory(layer))
    ]


def is_same(pool: RecurrentPool, before: list[torch.Tensor]) -> bool:
    now = copy_of(pool)
    return all(
        torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
        for a, b in zip(now, before, strict=True)
    )


def layout_of(
    mode: ForwardMode, query: Sequence[int], context: Sequence[int], slots: Sequence[int]
) -> BatchLayout:
    return BatchLayout.build(
        mode, query, context, [[0] for _ in query], CPU, None, state_slots=slots
    )


def run(layers: Sequence[GatedDeltaNet], hidden_TH: torch.Tensor, recur: Recur) -> torch.Tensor:
    with torch.inference_mode():
        for layer in layers:
            hidden_TH = hidden_TH + layer(hidden_TH, recur)
    return hidden_TH


class Decoded:
    """What plain decoding gives of one sequence, token by token, as far as anybody asked."""

    def __init__(self, layers: Sequence[GatedDeltaNet], seed: int) -> None:
        self.layers = layers
        self.seed = seed
        self.outputs = torch.empty(0, HIDDEN)
        self.states = [[new_state(layer) for layer in layers]]

    def extend(self, length: int) -> None:
        """Decode on until there are as many tokens."""
        single = Sequences([1], WIDTH, CPU)
        for token in range(len(self.outputs), length):
            row, states = hidden_of(token + 1, self.seed)[token:], []
            for layer, state in zip(self.layers, self.states[-1], strict=True):
                with torch.inference_mode():
                    output, after = layer.advance(row, single, state)
                    row = row + output
                states.append(after)
            self.outputs = torch.cat([self.outputs, row])
            self.states.append(states)


@cache
def decoded(layers: tuple[GatedDeltaNet, ...], seed: int) -> Decoded:
    return Decoded(layers, seed)


def assert_close(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, atol=TOLERANCE, rtol=TOLERANCE)


@dataclass
class Request:
    """A sequence of accepted rows, and what the passes gave for them."""

    seed: int
    outputs: list[torch.Tensor] = field(default_factory=list)

    @property
    def length(self) -> int:
        return sum(len(rows) for rows in self.outputs)

    def rows(self, count: int) -> torch.Tensor:
        """The next rows of the sequence."""
        return hidden_of(self.length + count, self.seed)[self.length :]


class Batch:
    """Requests in slots, driven pass by pass."""

    def __init__(self, layers: tuple[GatedDeltaNet, ...]) -> None:
        self.layers = layers
        self.pool = pool_of(layers)
        self.requests: dict[int, Request] = {}
        self.finished: list[Request] = []

    def admit(self, slot: int) -> Request:
        """A new request in a slot; who had it is finished."""
        if slot in self.requests:
            self.finished.append(self.requests[slot])
        self.requests[slot] = Request(seed=len(self.finished) * NUM_SLOTS + slot)
        return self.requests[slot]

    def move(self, lens: dict[int, int]) -> None:
        """A pass that prefills or decodes."""
        requests = [self.requests[slot] for slot in lens]
        contexts = [request.length + n for request, n in zip(requests, lens.values(), strict=True)]
        layout = layout_of(ForwardMode.PREFILL, list(lens.values()), contexts, list(lens))
        hidden = torch.cat(
            [request.rows(n) for request, n in zip(requests, lens.values(), strict=True)]
        )
        output = run(self.layers, hidden, MovedStates(self.pool, layout))
        for request, rows in zip(requests, output.split(list(lens.values())), strict=True):
            request.outputs.append(rows)

    def verify(self, accepted: dict[int, int], num_steps: int, *, is_dropped: bool = False) -> None:
        """A pass over right rows as far as they are accepted, and wrong ones from there."""
        requests = [self.requests[slot] for slot in accepted]
        layout = layout_of(
            ForwardMode.TARGET_VERIFY,
            [num_steps] * len(requests),
            [request.length + num_steps for request in requests],
            list(accepted),
        )
        hidden = [
            torch.cat([request.rows(right), 3 * hidden_of(num_steps - right, seed=999)])
            for request, right in zip(requests, accepted.values(), strict=True)
        ]
        before, recur = copy_of(self.pool), VerifiedStates(self.pool, layout)
        output = run(self.layers, torch.cat([torch.empty(0, HIDDEN), *hidden]), recur)
        assert is_same(self.pool, before), "states moved before anything was accepted"
        if is_dropped:
            return
        recur.accept(list(accepted.values()))
        for request, rows, right in zip(
            requests, output.split(num_steps), accepted.values(), strict=False
        ):
            request.outputs.append(rows[:right])

    def check(self) -> None:
        """Every request got what plain decoding gives, and its slot holds the states."""
        for request in (*self.finished, *self.requests.values()):
            expected = decoded(self.layers, request.seed)
            expected.extend(request.length)
            got = torch.cat([torch.empty(0, HIDDEN), *request.outputs])
            assert_close(got, expected.outputs[: request.length])
            slots = [slot for slot, running in self.requests.items() if running is request]
            for slot in slots if request.length else ():
                for layer, state in enumerate(expected.states[request.length]):
                    assert_close(self.pool.conv(layer)[slot], state.conv[0])
                    assert_close(self.pool.memory(layer)[slot], state.recurrent[0])


@st.composite
def passes(draw: st.DrawFn) -> list[tuple[str, list[int], int, list[int]]]:
    """``(kind, slots in the order of the pass, rows a request, accepted of each)``."""
    plan = []
    for _ in range(draw(st.integers(1, 5))):
        kind = draw(st.sampled_from(["verify", "verify", "verify", "drop", "move", "admit"]))
        slots = draw(st.permutations(range(NUM_SLOTS)))[: draw(st.integers(0, NUM_SLOTS))]
        num_steps = draw(st.integers(1, 5))
        accepted = [draw(st.integers(1, num_steps)) for _ in slots]
        plan.append((kind, slots, num_steps, accepted))
    return plan


@pytest.mark.parametrize(("layout", "heads"), LAYERS)
@given(plan=passes())
@settings(max_examples=6, deadline=None)
def test_whatever_is_accepted_equals_plain_decoding(
    layout: QKVLayout, heads: str, plan: list[tuple[str, list[int], int, list[int]]]
) -> None:
    batch = Batch(nets(layout, heads))
    for slot in range(NUM_SLOTS):
        batch.admit(slot)
    batch.move({0: 7, 2: 1})
    for kind, slots, num_steps, accepted in plan:
        own = dict(zip(slots, accepted, strict=True))
        if kind == "admit":
            for slot in slots:
                batch.admit(slot)
        elif kind == "move":
            batch.move(own or {0: 1})
        else:
            batch.verify(own, num_steps, is_dropped=kind == "drop")
    batch.check()


@pytest.fixture
def batch() -> Batch:
    """Requests of three lengths in slots 3, 0 and 1; nobody ever had slot 2."""
    batch = Batch(nets(*LAYERS[2]))
    for slot, length in ((3, 6), (0, 2), (1, 4)):
        batch.admit(slot)
        batch.move({slot: length})
    return batch


def verifying(
    batch: Batch, num_steps: int = 3, slots: Sequence[int] = (3, 0, 1)
) -> tuple[VerifiedStates, torch.Tensor]:
    layout = layout_of(
        ForwardMode.TARGET_VERIFY, [num_steps] * len(slots), [20] * len(slots), slots
    )
    return VerifiedStates(batch.pool, layout), hidden_of(num_steps * len(slots), seed=5)


def test_slots_out_of_order_with_different_acceptance(batch: Batch) -> None:
    batch.verify({1: 3, 3: 1, 0: 4}, 4)
    batch.verify({0: 1, 1: 1, 3: 4}, 4)
    batch.check()
    assert all(batch.pool.memory(layer)[2].isnan().all() for layer in range(NUM_LAYERS))


def test_a_request_that_takes_no_part_stays_where_it_was(batch: Batch) -> None:
    batch.verify({3: 2}, 3)
    batch.check()


def test_a_pass_that_is_dropped_leaves_nothing_behind(batch: Batch) -> None:
    batch.verify({0: 2, 3: 3}, 3, is_dropped=True)
    batch.check()
    batch.verify({3: 1, 0: 3}, 3)
    batch.check()


def test_a_pass_that_broke_off_between_layers_leaves_the_slots(batch: Batch) -> None:
    before = copy_of(batch.pool)
    recur, hidden = verifying(batch)
    run(batch.layers[:1], hidden, recur)
    assert is_same(batch.pool, before)
    with pytest.raises(AssertionError, match="every layer"):
        recur.accept([1, 1, 1])
    assert is_same(batch.pool, before)


def test_no_draft_is_plain_decoding(batch: Batch) -> None:
    batch.verify({1: 1, 3: 1}, 1)
    batch.check()


def test_a_request_that_begins_with_a_pass_that_verifies(batch: Batch) -> None:
    batch.admit(3)
    batch.verify({0: 2, 3: 2}, 3)
    batch.check()


def test_a_pass_without_requests(batch: Batch) -> None:
    before = copy_of(batch.pool)
    recur, hidden = verifying(batch, slots=())
    assert run(batch.layers, hidden, recur).shape == (0, HIDDEN)
    recur.accept([])
    assert is_same(batch.pool, before)


def test_a_pass_is_accepted_once_and_not_run_again(batch: Batch) -> None:
    recur, hidden = verifying(batch)
    run(batch.layers, hidden, recur)
    recur.accept([2, 1, 3])
    before = copy_of(batch.pool)
    with pytest.raises(AssertionError, match="accepted before"):
        recur.accept([2, 1, 3])
    with pytest.raises(AssertionError, match="accepted before"):
        run(batch.layers, hidden, recur)
    assert is_same(batch.pool, before)


@pytest.mark.parametrize("accepted", [[], [1, 1], [0, 1, 1], [1, 4, 1], [1, 1, 1, 1]], ids=str)
def test_every_request_accepts_some_of_its_tokens(batch: Batch, accepted: list[int]) -> None:
    recur, hidden = verifying(batch)
    run(batch.layers, hidden, recur)
    before = copy_of(batch.pool)
    with pytest.raises(AssertionError):
        recur.accept(accepted)
    assert is_same(batch.pool, before)


def test_requests_verify_the_same_number_of_tokens(batch: Batch) -> None:
    layout = layout_of(ForwardMode.TARGET_VERIFY, [2, 3], [20, 20], [0, 1])
    with pytest.raises(AssertionError, match="different numbers"):
        VerifiedStates(batch.pool, layout)


def test_the_pass_keeps_a_state_of_every_token_until_it_is_accepted(batch: Batch) -> None:
    recur, hidden = verifying(batch, num_steps=4)
    assert recur.num_bytes == 0
    run(batch.layers, hidden, recur)
    of_a_slot = batch.pool.num_bytes // NUM_SLOTS
    assert recur.num_bytes == 3 * 4 * of_a_slot
    recur.accept([1, 1, 1])
    assert recur.num_bytes == 0
