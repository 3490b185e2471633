"""Tokens are drawn from the distribution that a plain computation gives, row by row."""

from __future__ import annotations

from collections import Counter
from random import Random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mortise.engine.sampler import Filter, candidates, pick, sample
from mortise.engine.sampling_params import SamplingParams

VOCABULARY = 12
DRAWS = 4000


def request(seed: int = 0, **params) -> SimpleNamespace:
    """As much of a request as sampling looks at."""
    return SimpleNamespace(
        params=SamplingParams(**params), random=Random(seed), allowed_token_ids=None
    )


def distribution(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """The filtered distribution, one rule after the other, in double precision."""
    scaled = logits.astype(np.float64) / temperature
    order = np.argsort(-scaled, kind="stable")
    if top_k:
        order = order[:top_k]
    probabilities = np.exp(scaled[order] - scaled[order].max())
    probabilities /= probabilities.sum()
    kept, reached = [], 0.0
    for place, probability in enumerate(probabilities):
        if reached >= top_p:
            break
        kept.append(place)
        reached += probability
    result = np.zeros(len(logits))
    result[order[kept]] = probabilities[kept] / probabilities[kept].sum()
    return result


@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.55, 0.05])
@pytest.mark.parametrize("top_k", [0, 1, 5, VOCABULARY, 50])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_weights_are_the_filtered_distribution(
    temperature: float, top_k: int, top_p: float
) -> None:
    logits = torch.randn(3, VOCABULARY, generator=torch.Generator().manual_seed(4)) * 2
    weights_GC, token_ids_GC = candidates(logits, Filter(temperature, top_k, top_p))
    if token_ids_GC is None:
        token_ids_GC = torch.arange(VOCABULARY).expand(3, -1)
    for row in range(3):
        found = np.zeros(VOCABULARY)
        found[token_ids_GC[row].numpy()] = weights_GC[row].double().numpy()
        expected = distribution(logits[row].numpy(), temperature, top_k, top_p)
        np.testing.assert_allclose(found / found.sum(), expected, atol=1e-6)


@pytest.mark.parametrize(
    "params", [{}, {"top_k": 5}, {"top_p": 0.7}, {"top_k": 6, "top_p": 0.8}], ids=str
)
def test_frequencies_follow_the_distribution(params: dict) -> None:
    logits = torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(1)) * 2
    one = request(seed=3, temperature=1.3, **params)
    counts = Counter(sample(logits, [one])[0] for _ in range(DRAWS))
    expected = distribution(
        logits[0].numpy(), 1.3, params.get("top_k", 0), params.get("top_p", 1.0)
    )
    for token, probability in enumerate(expected):
        deviation = 5 * np.sqrt(probability * (1 - probability) / DRAWS)
        assert abs(counts[token] / DRAWS - probability) <= deviation
        assert probability > 0 or counts[token] == 0


@pytest.mark.parametrize("params", [{}, {"top_k": 2}, {"top_p": 0.7}], ids=str)
def test_a_choice_among_some_tokens_follows_their_distribution(params: dict) -> None:
    logits = torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(1)) * 2
    allowed = [9, 2, 7]
    one = request(seed=3, temperature=1.3, **params)
    one.allowed_token_ids = tuple(allowed)
    counts = Counter(sample(logits, [one])[0] for _ in range(DRAWS))
    expected = distribution(
        logits[0, allowed].numpy(), 1.3, params.get("top_k", 0), params.get("top_p", 1.0)
    )
    assert set(counts) <= set(allowed)
    for token, probability in zip(allowed, expected, strict=True):
        deviation = 5 * np.sqrt(probability * (1 - probability) / DRAWS)
        assert abs(counts[token] / DRAWS - probability) <= deviation


def test_greedy_takes_the_most_likely_and_no_random_number() -> None:
    one = request(seed=9)
    logits = torch.tensor([[0.0, 3.0, 1.0, 3.0]])
    assert sample(logits, [one]) == [1]
    assert one.random.random() == Random(9).random()


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    kinds = [
        {},
        {"temperature": 1.0},
        {"temperature": 1.0, "top_p": 0.8},
        {"temperature": 0.7, "top_k": 4},
        {"temperature": 1.0, "top_p": 0.8},
        {"temperature": 1.0},
    ]
    logits = torch.randn(len(kinds), VOCABULARY, generator=torch.Generator().manual_seed(2))
    together = [request(seed=n, **kind) for n, kind in enumerate(kinds)]
    alone = [request(seed=n, **kind) for n, kind in enumerate(kinds)]
    for _ in range(20):
        expected = [sample(logits[n : n + 1], [one])[0] for n, one in enumerate(alone)]
        assert sample(logits, together) == expected
        order = [3, 0, 5, 1, 4, 2]
        again = sample(logits[order], [together[n] for n in order])
        assert again == [sample(logits[n : n + 1], [alone[n]])[0] for n in order]


def test_logits_are_left_as_they_are() -> None:
    logits = torch.randn(1, VOCABULARY)
    before = logits.clone()
    sample(logits, [request(temperature=0.5, top_k=3, top_p=0.5)])
    assert torch.equal(logits, before)


def test_the_largest_draw_still_finds_a_token_with_weight() -> None:
    largest = torch.tensor([[1 - 2.0**-24]])
    weights = torch.tensor([[0.5, 0.25, 0.1, 0.0, 0.0]])
    assert pick(weights, largest).item() == 2
    assert pick(weights, torch.tensor([[0.0]])).item() == 0
    assert pick(torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.0]])).item() == 2
    many = torch.rand(1, 50_000, generator=torch.Generator().manual_seed(0)).softmax(-1)
    many[:, 40_000:] = 0
    assert pick(many, largest).item() < 40_000
