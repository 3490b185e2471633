"""Generated tokens judged by a chi-square test against transformers' filtered distributions.

Seeds are fixed, so a run gives what the last one gave. Right code with other seeds would be called
wrong once in ten thousand times by each of the comparisons.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mortise.engine.speculative import acceptance
from tests.engine.token_chains import START, WRONG_RULES, Chains, filtered, request

FALSE_ALARMS = 1e-4
VOCABULARY = 6
REQUESTS = 4000
LEAST_EXPECTED = 5.0
FILTERS = [
    {"temperature": 1.0},
    {"temperature": 0.6},
    {"temperature": 1.5, "top_k": 3},
    {"temperature": 1.0, "top_p": 0.7},
    {"temperature": 1.3, "top_k": 4, "top_p": 0.8},
]


def chance(counts: np.ndarray, probabilities: np.ndarray) -> float:
    """How probable counts are that fit no better; 0 if something impossible was counted.

    Pearson's chi-square test. What is expected too rarely for it is counted together.
    """
    if counts[probabilities == 0].any():
        return 0.0
    expected = probabilities * counts.sum()
    rare = expected < LEAST_EXPECTED
    counts = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    kept = expected > 0
    squared = ((counts[kept] - expected[kept]) ** 2 / expected[kept]).sum()
    freedom = kept.sum() - 1
    half = torch.tensor([freedom, squared], dtype=torch.float64) / 2
    return float(torch.special.gammaincc(half[0], half[1]))


@pytest.mark.parametrize(
    ("freedom", "squared", "expected"),
    [(1, 3.841, 0.05), (1, 10.828, 0.001), (10, 18.307, 0.05), (30, 59.703, 0.001)],
)
def test_the_chance_is_that_of_the_printed_tables(
    freedom: int, squared: float, expected: float
) -> None:
    # Equally many cells above and below what is expected of all, by what gives that statistic.
    cells = freedom + 1
    expected_count = 1000.0
    deviations = np.zeros(cells)
    deviations[:2] = np.array([1, -1]) * np.sqrt(squared * expected_count / 2)
    found = chance(expected_count + deviations, np.full(cells, 1 / cells))
    assert found == pytest.approx(expected, rel=2e-3)


def chances(params: dict, num_drafts: int) -> tuple[float, float]:
    """Of the first two tokens together, and of the two at the end of what a step may give."""
    chains = Chains.random(VOCABULARY, seed=num_drafts)
    requests = [request(seed=seed, **params) for seed in range(REQUESTS)]
    generated = np.array(chains.drafted(requests, num_drafts + 2, num_drafts))
    step = filtered(chains.main_VV, requests[0].params)
    first = np.eye(VOCABULARY)[START] @ step
    later = first @ np.linalg.matrix_power(step, num_drafts)
    return (
        chance(pairs(generated[:, :2]), first[:, None] * step),
        chance(pairs(generated[:, -2:]), later[:, None] * step),
    )


def pairs(tokens: np.ndarray) -> np.ndarray:
    """How often each token was followed by each."""
    counts = np.zeros((VOCABULARY, VOCABULARY))
    np.add.at(counts, (tokens[:, 0], tokens[:, 1]), 1)
    return counts


@pytest.mark.parametrize("params", FILTERS, ids=str)
@pytest.mark.parametrize("num_drafts", [1, 2, 3, 4])
def test_drafting_samples_from_the_main_models_distribution(num_drafts: int, params: dict) -> None:
    assert min(chances(params, num_drafts)) > FALSE_ALARMS


@pytest.mark.parametrize("rule", WRONG_RULES)
@pytest.mark.parametrize("num_drafts", [1, 4])
def test_another_rule_of_acceptance_is_found_out(
    rule: str, num_drafts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(acceptance, *WRONG_RULES[rule])
    assert min(chances({"temperature": 1.0}, num_drafts)) < 1e-9
