"""The law of what drafting emits, computed from the code without chance."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mortise.engine.sampler import distributions
from mortise.engine.speculative import acceptance
from mortise.engine.speculative.acceptance import Proposal, accept, residual
from tests.engine.test_acceptance import Scripted
from tests.engine.token_chains import START, WRONG_RULES, Chains, filtered, request

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np

    from mortise.engine.sampling_params import SamplingParams

NUMBERS = 2**24
"""Random numbers there are; every one of them is as likely."""

weights = st.lists(st.integers(0, 20), min_size=5, max_size=5).filter(any)


@settings(max_examples=200)
@given(p_weights=weights, q_weights=weights)
def test_acceptance_and_residual_add_up_to_p(p_weights: list[int], q_weights: list[int]) -> None:
    p, q = (torch.tensor(some).float() / sum(some) for some in (p_weights, q_weights))
    accepted = torch.minimum(p, q)
    rest = residual(p[None], q[None])[0]
    emitted = accepted + (1 - accepted.sum()) * rest / rest.sum()
    torch.testing.assert_close(emitted, p, atol=1e-6, rtol=0)


def least(holds: Callable[[list[int]], list[bool]], size: int) -> list[int]:
    """For each row the least number from which on its condition holds, by bisection."""
    low, high = [0] * size, [NUMBERS] * size
    while any(low[row] < high[row] for row in range(size)):
        middle = [(low[row] + high[row]) // 2 for row in range(size)]
        for row, held in enumerate(holds([min(number, NUMBERS - 1) for number in middle])):
            if low[row] < high[row]:
                low[row], high[row] = (
                    (low[row], middle[row]) if held else (middle[row] + 1, high[row])
                )
    return low


class Step:
    """One verify pass over every chain of drafts at once, run by chosen random numbers."""

    def __init__(self, chains: Chains, params: dict, num_drafts: int, *, certain: bool) -> None:
        vocabulary = len(chains.main_VV)
        self.params = params
        self.num_drafts = num_drafts
        self.vocabulary = vocabulary
        self.drafts = list(product(range(vocabulary), repeat=num_drafts))
        rows = [[START, *drafts] for drafts in self.drafts]
        self.logits = chains.main_VV[torch.tensor(rows)]
        self.weights = distributions(chains.draft_VV, [request(**params)] * vocabulary)
        self.proposals = [
            Proposal(drafts, None if certain else self.weights[[START, *drafts[:-1]]])
            for drafts in self.drafts
        ]

    def run(self, scripts: Sequence[Sequence[int]]) -> list[list[int]]:
        requests = [request(**self.params) for _ in scripts]
        for one, numbers in zip(requests, scripts, strict=True):
            one.random = Scripted(*numbers, *[0] * (self.num_drafts + 1))
        return accept(self.logits, self.proposals, requests)

    def rejected_from(self, place: int) -> list[int]:
        """For each chain the least number that rejects the draft at a place, if it gets there."""

        def is_rejected(numbers: list[int]) -> list[bool]:
            taken = self.run([[*[0] * place, number] for number in numbers])
            return [len(tokens) == place + 1 for tokens in taken]

        return least(is_rejected, len(self.drafts))

    def last_from(self, place: int, token_id: int) -> list[int]:
        """For each chain the least number that puts a token or a later one after a rejection."""
        reject = [NUMBERS - 1] if place < self.num_drafts else []

        def is_reached(numbers: list[int]) -> list[bool]:
            taken = self.run([[*[0] * place, *reject, number] for number in numbers])
            return [tokens[-1] >= token_id for tokens in taken]

        return least(is_reached, len(self.drafts))

    def outcomes(self) -> list[dict[tuple[int, ...], float]]:
        """For each chain the probability of everything that the pass may give."""
        result: list[dict[tuple[int, ...], float]] = [{} for _ in self.drafts]
        reached = [1.0] * len(self.drafts)
        for place in range(self.num_drafts + 1):
            ends = [0] * len(self.drafts)
            if place < self.num_drafts:
                ends = self.rejected_from(place)
            bounds = [self.last_from(place, token_id) for token_id in range(self.vocabulary)]
            bounds.append([NUMBERS] * len(self.drafts))
            for row, drafts in enumerate(self.drafts):
                stops = reached[row] * (1 - ends[row] / NUMBERS)
                for token_id in range(self.vocabulary):
                    share = (bounds[token_id + 1][row] - bounds[token_id][row]) / NUMBERS
                    if stops * share:
                        result[row][*drafts[:place], token_id] = stops * share
                reached[row] *= ends[row] / NUMBERS
        return result


def path(table: np.ndarray, tokens: Sequence[int], newest: int = START) -> float:
    """Probability of tokens one after the other, row t of the table being that after token t."""
    result = 1.0
    for token_id in tokens:
        result *= table[newest, token_id]
        newest = token_id
    return result


def law(step: Step, main: np.ndarray, draft: np.ndarray) -> dict[tuple[int, ...], float]:
    """Of the first tokens, one more than there are drafts: a pass, and the rest plainly."""
    result = dict.fromkeys(product(range(step.vocabulary), repeat=step.num_drafts + 1), 0.0)
    for drafts, outcomes in zip(step.drafts, step.outcomes(), strict=True):
        proposed = path(draft, drafts)
        for tokens, probability in outcomes.items():
            for rest in product(range(step.vocabulary), repeat=step.num_drafts + 1 - len(tokens)):
                after = path(main, rest, tokens[-1])
                result[*tokens, *rest] += proposed * probability * after
    return result


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1.0},
        {"temperature": 0.4},
        {"temperature": 1.5, "top_k": 2},
        {"temperature": 1.0, "top_p": 0.7},
        {"temperature": 0.8, "top_k": 2, "top_p": 0.6},
    ],
    ids=str,
)
@pytest.mark.parametrize(("vocabulary", "num_drafts"), [(5, 1), (4, 2), (3, 3), (2, 4)])
def test_the_first_tokens_have_the_main_models_joint_distribution(
    vocabulary: int, num_drafts: int, params: dict
) -> None:
    chains = Chains.random(vocabulary, seed=vocabulary)
    check(chains, params, num_drafts, certain=False)


def test_so_have_they_if_the_drafts_are_certain() -> None:
    chains = Chains.random(4, seed=11)
    chains = Chains(chains.main_VV, torch.eye(4)[[2, 3, 1, 0]] * 1e4)
    check(chains, {"temperature": 1.0}, 2, certain=True)


@pytest.mark.parametrize("rule", WRONG_RULES)
def test_another_rule_of_acceptance_has_another_law(
    rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(acceptance, *WRONG_RULES[rule])
    with pytest.raises(AssertionError):
        check(Chains.random(4, seed=4), {"temperature": 1.0, "top_k": 3}, 2, certain=False)


def check(chains: Chains, params: dict, num_drafts: int, *, certain: bool) -> None:
    shape: SamplingParams = request(**params).params
    main, draft = filtered(chains.main_VV, shape), filtered(chains.draft_VV, shape)
    found = law(Step(chains, params, num_drafts, certain=certain), main, draft)
    assert sum(found.values()) == pytest.approx(1.0, abs=1e-6)
    for tokens, probability in found.items():
        assert probability == pytest.approx(path(main, tokens), abs=1e-6)
