"""The gated delta net gives what transformers gives, however sequences are cut and batched."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
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

from mortise.layers.gated_delta_net import GatedDeltaNet, GatedDeltaState
from mortise.layers.sequences import Sequences
from mortise.spec.qkv import QKVLayout, QKVParts, QKVShape

if TYPE_CHECKING:
    from collections.abc import Sequence

TOLERANCE = 1e-4
LENGTHS = (1, 7, 64, 65, 130)


def advance(
    layer: GatedDeltaNet, hidden: torch.Tensor, state: GatedDeltaState, *lens: int
) -> tuple[torch.Tensor, GatedDeltaState]:
    """One call with sequences of some lengths, or with a single one."""
    return layer.advance(hidden, Sequences(lens or (len(hidden),), WIDTH, CPU), state)


def difference(got: torch.Tensor, expected: torch.Tensor) -> float:
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    return float((got - expected).abs().max()) if got.numel() else 0.0


def in_chunks(
    layer: GatedDeltaNet, hidden: torch.Tensor, chunks: Sequence[int]
) -> tuple[torch.Tensor, GatedDeltaState]:
    outputs, state = [], new_state(layer)
    for chunk in hidden.split(list(chunks)):
        output, state = advance(layer, chunk, state)
        outputs.append(output)
    return torch.cat(outputs), state


@pytest.fixture(params=QKVLayout)
def layer(request: pytest.FixtureRequest) -> GatedDeltaNet:
    shape = shape_of(request.param, "twice as many")
    return layer_of(shape, their_layer(shape).state_dict())


@pytest.mark.parametrize(("layout", "heads"), LAYERS)
@torch.inference_mode()
def test_transformers_gives_the_same(layout: QKVLayout, heads: str) -> None:
    shape = shape_of(layout, heads)
    theirs = their_layer(shape)
    ours = layer_of(shape, theirs.state_dict())
    for tokens in LENGTHS:
        hidden = hidden_of(tokens)
        expected = theirs(hidden.unsqueeze(0))[0]
        output, _ = advance(ours, hidden, new_state(ours))
        assert expected.abs().max() > 100 * TOLERANCE, "too small to differ"
        assert difference(output, expected) < TOLERANCE


@pytest.mark.parametrize(("layout", "heads"), LAYERS)
@torch.inference_mode()
def test_a_late_token_remembers_the_first(layout: QKVLayout, heads: str) -> None:
    """Past the width of the convolution only the recurrent state can tell."""
    shape = shape_of(layout, heads)
    layer = layer_of(shape, their_layer(shape).state_dict())
    hidden, other = hidden_of(8), hidden_of(8)
    other[0] = hidden_of(1, seed=1)
    output, _ = advance(layer, hidden, new_state(layer))
    changed, _ = advance(layer, other, new_state(layer))
    assert difference(changed[-1], output[-1]) > 100 * TOLERANCE


@pytest.mark.parametrize(
    "chunks", [[64, 1], [1, 64], [2, 3, 60], [0, 30, 0, 35], [1] * 65], ids=str
)
@torch.inference_mode()
def test_chunks_give_what_the_whole_gives(layer: GatedDeltaNet, chunks: list[int]) -> None:
    hidden = hidden_of(65)
    expected, expected_state = advance(layer, hidden, new_state(layer))
    output, state = in_chunks(layer, hidden, chunks)
    assert difference(output, expected) < 1e-5
    assert difference(state.conv, expected_state.conv) < 1e-5
    assert difference(state.recurrent, expected_state.recurrent) < 1e-5


@torch.inference_mode()
def test_no_token_changes_nothing(layer: GatedDeltaNet) -> None:
    _, before = advance(layer, hidden_of(5), new_state(layer))
    output, after = advance(layer, hidden_of(0), before)
    assert output.shape == (0, HIDDEN)
    assert torch.equal(after.conv, before.conv)
    assert torch.equal(after.recurrent, before.recurrent)


@pytest.mark.parametrize("tokens", [0, 1, 9])
@torch.inference_mode()
def test_the_state_that_came_in_stays_as_it_was(layer: GatedDeltaNet, tokens: int) -> None:
    _, state = advance(layer, hidden_of(5), new_state(layer))
    kept = GatedDeltaState(conv=state.conv.clone(), recurrent=state.recurrent.clone())
    first, _ = advance(layer, hidden_of(tokens, seed=1), state)
    assert torch.equal(state.conv, kept.conv)
    assert torch.equal(state.recurrent, kept.recurrent)
    assert torch.equal(advance(layer, hidden_of(tokens, seed=1), state)[0], first)


@torch.inference_mode()
def test_the_convolution_keeps_no_more_than_it_needs(layer: GatedDeltaNet) -> None:
    _, state = advance(layer, hidden_of(65), new_state(layer))
    assert state.conv.untyped_storage().nbytes() == state.conv.nbytes


@torch.inference_mode()
def test_the_memory_is_float32_in_a_bfloat16_model(layer: GatedDeltaNet) -> None:
    hidden = hidden_of(7)
    expected, _ = advance(layer, hidden, new_state(layer))
    layer.bfloat16()
    output, state = advance(layer, hidden.bfloat16(), new_state(layer))
    assert output.dtype == state.conv.dtype == torch.bfloat16
    assert state.recurrent.dtype == torch.float32
    # Eight bits of mantissa through two projections.
    assert difference(output.float(), expected) < 0.05 * float(expected.abs().max())


@pytest.mark.parametrize("tokens", [0, 1, 7])
@torch.inference_mode()
def test_one_call_of_the_hook_per_pass(layer: GatedDeltaNet, tokens: int) -> None:
    calls: list[tuple[torch.Size, torch.Size, QKVShape]] = []
    ops = layer.ops

    def recorded(qkvz: torch.Tensor, ba: torch.Tensor, shape: QKVShape, /) -> QKVParts:
        calls.append((qkvz.shape, ba.shape, shape))
        return ops.qkv_split(qkvz, ba, shape)

    layer.ops = replace(ops, qkv_split=recorded)
    advance(layer, hidden_of(tokens), new_state(layer))
    # Two key heads of 16, four value heads of 8.
    assert calls == [((tokens, 2 * 2 * 16 + 2 * 4 * 8), (tokens, 2 * 4), layer.shape)]


@torch.inference_mode()
def test_sequences_of_any_lengths_read_together_give_what_each_gives_alone(
    layer: GatedDeltaNet,
) -> None:
    lens = (3, 0, 64, 130, 1, 65, 63)
    states = [advance(layer, hidden_of(1 + n, seed=20 + n), new_state(layer))[1] for n in range(7)]
    hidden = hidden_of(sum(lens))
    together = GatedDeltaState(
        conv=torch.cat([state.conv for state in states]),
        recurrent=torch.cat([state.recurrent for state in states]),
    )
    output, after = advance(layer, hidden, together, *lens)
    alone = [
        advance(layer, rows, state) for rows, state in zip(hidden.split(lens), states, strict=True)
    ]
    assert difference(output, torch.cat([rows for rows, _ in alone])) < 1e-5
    assert difference(after.conv, torch.cat([state.conv for _, state in alone])) < 1e-5
    assert difference(after.recurrent, torch.cat([s.recurrent for _, s in alone])) < 1e-5


@torch.inference_mode()
def test_a_broken_sequence_breaks_no_other(layer: GatedDeltaNet) -> None:
    hidden = hidden_of(90)
    expected, _ = advance(layer, hidden, new_state(layer, 3), 10, 5, 75)
    hidden[10:15] = torch.nan
    output, state = advance(layer, hidden, new_state(layer, 3), 10, 5, 75)
    assert output[10:15].isnan().all()
    assert torch.equal(output[:10], expected[:10])
    assert torch.equal(output[15:], expected[15:])
    assert state.recurrent[[0, 2]].isfinite().all()
