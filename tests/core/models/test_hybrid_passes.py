"""However a sequence is cut, batched, paged and slotted, a hybrid model gives the same logits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from tests.fixtures.hybrid_models import MODEL_TYPES, HybridModel, Request, loaded, tokens_of

from mortise.kv.pages import pages_for
from mortise.spec.roles import ForwardMode

if TYPE_CHECKING:
    from pathlib import Path

TOLERANCE = 1e-4
AROUND_ENDS = (1, 2, 3, 63, 64, 65, 128)
"""Lengths about the width of the convolution, a chunk of the delta rule and a page."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(params=MODEL_TYPES)
def model(request: pytest.FixtureRequest, root: Path) -> HybridModel:
    model = loaded(request.param, root)
    model.poison()
    return model


def assert_close(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert got.shape == expected.shape
    assert got.isfinite().all(), "what nobody wrote was read"
    difference = float((got - expected).abs().max()) if got.numel() else 0.0
    assert difference < TOLERANCE, f"logits differ by {difference}"


@pytest.mark.parametrize("length", AROUND_ENDS)
def test_decoding_after_a_prompt(model: HybridModel, length: int) -> None:
    tokens = tokens_of(length + 3)
    expected = model.full(tokens)
    model.poison()
    assert_close(model.stepwise(tokens, [length]), expected)


@pytest.mark.parametrize("chunks", [[64, 64], [63, 1, 1], [1, 1, 1, 127], [2, 126], [50, 50, 20]])
def test_chunks(model: HybridModel, chunks: list[int]) -> None:
    tokens = tokens_of(130)
    expected = model.full(tokens)
    model.poison()
    assert_close(model.stepwise(tokens, chunks), expected)


def test_decoding_every_token_from_the_first(model: HybridModel) -> None:
    tokens = tokens_of(20)
    expected = model.full(tokens)
    model.poison()
    assert_close(model.stepwise(tokens, [1]), expected)


def test_a_ragged_batch_equals_its_requests_alone(model: HybridModel) -> None:
    """Prompts of different lengths together, then one token of each."""
    lengths, slots = (65, 3, 64, 130), (5, 0, 2, 1)
    sequences = [tokens_of(length + 1, seed=length) for length in lengths]
    expected = [model.full(sequence) for sequence in sequences]
    pages = [[9, 2], [4], [7, 3], [0, 11, 5]]
    model.poison()
    requests = list(zip(sequences, lengths, pages, slots, strict=True))
    prefilled = model.forward(
        ForwardMode.PREFILL,
        [Request(sequence[:-1], length, own, slot) for sequence, length, own, slot in requests],
    )
    assert_close(prefilled, torch.cat([logits[:-1] for logits in expected]))
    decoded = model.forward(
        ForwardMode.DECODE,
        [Request(sequence[-1:], length + 1, own, slot) for sequence, length, own, slot in requests],
    )
    assert_close(decoded, torch.cat([logits[-1:] for logits in expected]))


def test_a_chunk_beside_a_prompt_that_begins(model: HybridModel) -> None:
    first, second = tokens_of(100, seed=1), tokens_of(40, seed=2)
    expected = [model.full(first), model.full(second)]
    model.poison()
    model.forward(ForwardMode.PREFILL, [Request(first[:33], 33, [3, 9], 4)])
    together = model.forward(
        ForwardMode.PREFILL,
        [Request(first[33:], 100, [3, 9], 4), Request(second, 40, [8], 2)],
    )
    assert_close(together, torch.cat([expected[0][33:], expected[1]]))


def test_requests_take_turns(model: HybridModel) -> None:
    """What one does to its state does not reach the other's."""
    sequences = [tokens_of(60, seed=1), tokens_of(60, seed=2)]
    expected = [model.full(sequence) for sequence in sequences]
    model.poison()
    for start in range(0, 60, 20):
        for number, sequence in enumerate(sequences):
            request = Request(sequence[start : start + 20], start + 20, [number], number + 1)
            got = model.forward(ForwardMode.PREFILL, [request])
            assert_close(got, expected[number][start : start + 20])


def test_one_request_cannot_see_anothers_broken_state(model: HybridModel) -> None:
    """A neighbour in the batch whose state holds NaN loses its own logits and no others."""
    sequences, pages = [tokens_of(40, seed=1), tokens_of(100, seed=2)], [[3], [5, 6]]
    prompts = [
        Request(tokens[:-1], len(tokens) - 1, own, slot)
        for slot, (tokens, own) in enumerate(zip(sequences, pages, strict=True))
    ]
    newest = [
        Request(tokens[-1:], len(tokens), own, slot)
        for slot, (tokens, own) in enumerate(zip(sequences, pages, strict=True))
    ]
    expected = [model.full(tokens)[-1] for tokens in sequences]
    model.forward(ForwardMode.PREFILL, prompts)
    model.pool.states.memory(1)[1] = torch.nan
    got = model.forward(ForwardMode.DECODE, newest)
    assert got[1].isnan().all()
    assert_close(got[0], expected[0])


def test_pages_and_a_slot_that_another_request_left_behind(model: HybridModel) -> None:
    tokens = tokens_of(100)
    expected = model.full(tokens, slot=4)
    model.stepwise(tokens_of(128, seed=9), [128], pages=[6, 2], slot=3)
    assert_close(model.stepwise(tokens, [30, 40], pages=[6, 2], slot=3), expected)


def test_a_preempted_request_computed_again(model: HybridModel) -> None:
    """Generated tokens that come back as a prefill get the logits that they had when decoded."""
    tokens = tokens_of(70)
    before = model.stepwise(tokens, [50], pages=[1, 8], slot=0)
    model.forward(ForwardMode.PREFILL, [Request(tokens_of(30, seed=3), 30, [1], 0)])
    again = model.forward(ForwardMode.PREFILL, [Request(tokens, 70, [4, 0], 5)])
    assert_close(again, before)


@pytest.mark.parametrize("mode", [ForwardMode.TARGET_VERIFY, ForwardMode.DRAFT_EXTEND])
def test_several_tokens_of_a_request_equal_single_decoding(
    model: HybridModel, mode: ForwardMode
) -> None:
    sequences = [tokens_of(66, seed=1), tokens_of(24, seed=2)]
    expected = [model.full(sequence)[-4:] for sequence in sequences]
    places = [([3, 9], 5), ([12], 1)]
    model.poison()
    for part, chosen in ((slice(None, -4), ForwardMode.PREFILL), (slice(-4, None), mode)):
        got = model.forward(
            chosen,
            [
                Request(sequence[part], len(sequence) - (4 if part.stop else 0), *place)
                for sequence, place in zip(sequences, places, strict=True)
            ],
        )
    assert_close(got, torch.cat(expected))


@pytest.mark.parametrize("mode", ForwardMode)
def test_a_pass_without_requests(model: HybridModel, mode: ForwardMode) -> None:
    assert model.forward(mode, []).shape == (0, 272)
    assert model.pool.states.memory(0).isnan().all(), "an idle pass wrote a state"
    assert model.pool.key_values.keys(0).isnan().all(), "an idle pass wrote to the cache"


def test_a_request_without_new_tokens_beside_one_with(model: HybridModel) -> None:
    tokens = tokens_of(32)
    expected = model.full(tokens)
    model.poison()
    model.forward(ForwardMode.PREFILL, [Request(tokens[:30], 30, [1], 2)])
    idle, other = Request(tokens[:0], 30, [1], 2), Request(tokens, 32, [4], 0)
    assert_close(model.forward(ForwardMode.PREFILL, [idle, other]), expected)
    assert_close(
        model.forward(ForwardMode.PREFILL, [Request(tokens[30:], 32, [1], 2)]), expected[30:]
    )


def test_memory_does_not_grow_with_the_context(model: HybridModel) -> None:
    few, many = (
        model.model.new_pool(pages, torch.float32, torch.device("meta"), num_slots=2)
        for pages in (pages_for(64), pages_for(6400))
    )
    assert few.states.num_bytes == many.states.num_bytes > 0
    assert many.num_bytes - many.states.num_bytes == 100 * (few.num_bytes - few.states.num_bytes)
