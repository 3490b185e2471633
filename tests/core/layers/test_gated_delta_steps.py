"""Tokens read at once, kept one by one, are to the bit the tokens that a net decodes singly."""

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
from torch import nn

from mortise.layers.gated_delta_net import GatedDeltaState
from mortise.layers.sequences import Sequences, Steps

if TYPE_CHECKING:
    from mortise.layers.gated_delta_net import GatedDeltaNet, GatedDeltaSteps
    from mortise.spec.qkv import QKVLayout, QKVParts, QKVShape

PROMPTS = (5, 1, 9)


class RowByRow(nn.Module):
    """A projection that gives a row the same bits whatever rows are beside it.

    A product of matrices may add in another order when it has another number of rows.
    """

    def __init__(self, projection: nn.Module) -> None:
        super().__init__()
        self.projection = projection

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.projection(row) for row in hidden.split(1)])


def row_by_row(layer: GatedDeltaNet) -> GatedDeltaNet:
    for name, module in list(layer.named_children()):
        if name.endswith("_proj") or name.startswith("in_proj"):
            setattr(layer, name, RowByRow(module))
    return layer


def started(layer: GatedDeltaNet, count: int) -> GatedDeltaState:
    """States of sequences after prompts of different lengths."""
    lens = PROMPTS[:count]
    sequences = Sequences(lens, WIDTH, CPU)
    hidden = hidden_of(sum(lens), seed=7).to(layer.conv1d.weight.dtype)
    return layer.advance(hidden, sequences, new_state(layer, count))[1]


def decoded(
    layer: GatedDeltaNet, hidden_BSH: torch.Tensor, state: GatedDeltaState
) -> tuple[torch.Tensor, list[GatedDeltaState]]:
    """Outputs ``[B, S, H]`` of one pass a token, and the state after each."""
    single = Sequences((1,) * len(hidden_BSH), WIDTH, CPU)
    outputs, states = [], []
    for token in range(hidden_BSH.shape[1]):
        output, state = layer.advance(hidden_BSH[:, token].contiguous(), single, state)
        outputs.append(output)
        states.append(state)
    return torch.stack(outputs, dim=1), states


def by_steps(
    layer: GatedDeltaNet, hidden_BSH: torch.Tensor, state: GatedDeltaState
) -> tuple[torch.Tensor, GatedDeltaSteps]:
    """Outputs ``[B, S, H]`` of one pass, and what it keeps."""
    steps = Steps(*hidden_BSH.shape[:2], WIDTH, CPU)
    output, kept = layer.advance_by_steps(hidden_BSH.flatten(0, 1), steps, state)
    return output.view(hidden_BSH.shape), kept


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize(("layout", "heads"), LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.inference_mode()
def test_every_token_is_to_the_bit_what_decoding_gives(
    layout: QKVLayout, heads: str, count: int, dtype: torch.dtype
) -> None:
    shape = shape_of(layout, heads)
    layer = row_by_row(layer_of(shape, their_layer(shape).state_dict()).to(dtype))
    state = started(layer, count)
    hidden_BSH = hidden_of(count * 5).view(count, 5, HIDDEN).to(dtype)
    expected, states = decoded(layer, hidden_BSH, state)
    output, kept = by_steps(layer, hidden_BSH, state)
    assert torch.equal(output, expected)
    assert output.dtype == dtype
    for token, after in enumerate(states):
        assert torch.equal(kept.conv[:, token], after.conv)
        assert torch.equal(kept.recurrent[:, token], after.recurrent)


@pytest.mark.parametrize(("layout", "heads"), LAYERS)
@torch.inference_mode()
def test_products_of_several_rows_differ_by_rounding_alone(layout: QKVLayout, heads: str) -> None:
    shape = shape_of(layout, heads)
    layer = layer_of(shape, their_layer(shape).state_dict())
    state, hidden_BSH = started(layer, 3), hidden_of(12).view(3, 4, HIDDEN)
    expected, states = decoded(layer, hidden_BSH, state)
    output, kept = by_steps(layer, hidden_BSH, state)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=0)
    for token, after in enumerate(states):
        torch.testing.assert_close(kept.recurrent[:, token], after.recurrent, atol=1e-5, rtol=0)


@pytest.fixture
def layer() -> GatedDeltaNet:
    layout, heads = LAYERS[2]
    shape = shape_of(layout, heads)
    return layer_of(shape, their_layer(shape).state_dict())


@torch.inference_mode()
def test_each_sequence_continues_after_its_own_number_of_tokens(layer: GatedDeltaNet) -> None:
    _, kept = by_steps(layer, hidden_of(12).view(3, 4, HIDDEN), started(layer, 3))
    state = kept.after(torch.tensor([2, 4, 1]))
    for number, newest in enumerate([1, 3, 0]):
        assert torch.equal(state.conv[number], kept.conv[number, newest])
        assert torch.equal(state.recurrent[number], kept.recurrent[number, newest])


@torch.inference_mode()
def test_the_state_that_came_in_stays_as_it_was(layer: GatedDeltaNet) -> None:
    state = started(layer, 2)
    before = GatedDeltaState(conv=state.conv.clone(), recurrent=state.recurrent.clone())
    by_steps(layer, hidden_of(8).view(2, 4, HIDDEN), state)
    assert torch.equal(state.conv, before.conv)
    assert torch.equal(state.recurrent, before.recurrent)


@torch.inference_mode()
def test_no_sequences(layer: GatedDeltaNet) -> None:
    output, kept = by_steps(layer, hidden_of(0).view(0, 4, HIDDEN), new_state(layer, 0))
    assert output.shape == (0, 4, HIDDEN)
    assert kept.num_bytes == 0
    assert kept.after(torch.tensor([], dtype=torch.int64)).recurrent.shape[0] == 0


@torch.inference_mode()
def test_what_is_kept_is_one_state_a_token(layer: GatedDeltaNet) -> None:
    state = started(layer, 3)
    _, kept = by_steps(layer, hidden_of(12).view(3, 4, HIDDEN), state)
    assert kept.num_bytes == 4 * (state.conv.nbytes + state.recurrent.nbytes)
    assert kept.recurrent.dtype == torch.float32


@torch.inference_mode()
def test_one_split_of_the_projections_a_pass(layer: GatedDeltaNet) -> None:
    state, rows, split = started(layer, 3), [], layer.ops.qkv_split

    def recorded(qkvz: torch.Tensor, ba: torch.Tensor, shape: QKVShape, /) -> QKVParts:
        rows.append(len(qkvz))
        return split(qkvz, ba, shape)

    layer.ops = replace(layer.ops, qkv_split=recorded)
    by_steps(layer, hidden_of(12).view(3, 4, HIDDEN), state)
    assert rows == [12]
