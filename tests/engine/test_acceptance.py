"""Accepted drafts and the token after them: what greedy decoding gives, and what p and q say."""

from __future__ import annotations

from itertools import product
from random import Random
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mortise.engine.sampler import distributions
from mortise.engine.speculative.acceptance import Proposal, accept, draw, residual
from tests.engine.token_chains import Chains, filtered, request

if TYPE_CHECKING:
    from types import SimpleNamespace

GREATEST = 2**24 - 1


class Scripted:
    """Random numbers that a test chooses: the next of 24 bits at each call."""

    def __init__(self, *numbers: int) -> None:
        self.left = list(numbers)

    def getrandbits(self, bits: int) -> int:
        assert bits == 24
        return self.left.pop(0)


def scripted(*numbers: int, **params) -> SimpleNamespace:
    one = request(**{"temperature": 1.0, **params})
    one.random = Scripted(*numbers)
    return one


def log(*weights: float) -> torch.Tensor:
    return torch.tensor(weights).log()


# Greedy.


@pytest.mark.parametrize("num_drafts", [1, 2, 3, 4])
def test_greedy_keeps_the_right_drafts_at_the_front_whatever_the_pattern(num_drafts: int) -> None:
    patterns = list(product([True, False], repeat=num_drafts))
    generator = torch.Generator().manual_seed(num_drafts)
    logits = torch.randn(len(patterns), num_drafts + 1, 7, generator=generator)
    best = logits.numpy().argmax(-1)
    proposals = [
        Proposal(tuple(int(best[row, j] + (not right)) % 7 for j, right in enumerate(rights)), None)
        for row, rights in enumerate(patterns)
    ]
    requests = [request(seed=5) for _ in patterns]
    taken = accept(logits, proposals, requests)
    for row, rights in enumerate(patterns):
        num_right = (*rights, False).index(False)
        assert taken[row] == best[row, : num_right + 1].tolist()
        assert requests[row].random.getstate() == Random(5).getstate()


@settings(max_examples=60)
@given(data=st.data())
def test_greedy_drafting_gives_the_tokens_of_plain_decoding(data: st.DataObject) -> None:
    vocabulary = data.draw(st.integers(1, 6), label="vocabulary")
    # Few different values, so that the most likely token is often one of several.
    tables = st.lists(
        st.integers(-2, 2).map(float), min_size=vocabulary**2, max_size=vocabulary**2
    ).map(lambda values: torch.tensor(values).view(vocabulary, vocabulary))
    chains = Chains(data.draw(tables), data.draw(tables))
    num_drafts = data.draw(st.integers(1, 4), label="drafts")
    size = data.draw(st.integers(1, 3), label="requests")
    plain = chains.plain([request() for _ in range(size)], 9)
    assert chains.drafted([request() for _ in range(size)], 9, num_drafts) == plain


def test_greedy_drafts_come_without_distributions_and_random_numbers() -> None:
    requests = [request(seed=1), request(seed=2)]
    tokens, weights = draw(torch.tensor([[0.0, 2.0, 1.0], [3.0, 2.0, 3.0]]), requests)
    assert (tokens, weights) == ([1, 0], None)
    assert requests[0].random.getstate() == Random(1).getstate()


# What drafts are drawn from.

FILTERS = [
    {"temperature": 1.0},
    {"temperature": 0.3},
    {"temperature": 2.5, "top_k": 3},
    {"temperature": 1.2, "top_p": 0.6},
    {"temperature": 0.8, "top_k": 6, "top_p": 0.9},
    {"temperature": 1.0, "top_k": 1},
]


def test_distributions_are_those_of_transformers() -> None:
    logits = torch.randn(len(FILTERS) * 4, 30, generator=torch.Generator().manual_seed(8)) * 2
    requests = [request(**params) for params in FILTERS for _ in range(4)]
    found = distributions(logits, requests)
    assert found.dtype == torch.float32
    for row, one in enumerate(requests):
        expected = filtered(logits[row : row + 1], one.params)[0]
        np.testing.assert_allclose(found[row].double().numpy(), expected, atol=1e-6)
        assert ((found[row] == 0).numpy() == (expected == 0)).all()


def test_a_draw_takes_one_number_and_says_what_it_was_drawn_from() -> None:
    logits = torch.randn(3, 8, generator=torch.Generator().manual_seed(3))
    requests = [request(), scripted(0, top_k=2), scripted(GREATEST, top_k=2)]
    tokens, weights = draw(logits, requests)
    assert weights is not None
    assert torch.equal(weights, distributions(logits, requests))
    assert weights[0, tokens[0]] == 1.0
    kept = [row.nonzero().flatten().tolist() for row in weights]
    assert tokens == [int(logits[0].argmax()), kept[1][0], kept[2][-1]]
    assert requests[1].random.left == requests[2].random.left == []


# Sampled: one decision at a time.


def test_a_draft_is_accepted_below_the_quotient_and_rejected_from_it_on() -> None:
    # p(1) / q(1) is 1/2; no other token is less likely in q than in p but 0.
    logits = log(0.75, 0.25).expand(1, 2, 2)
    proposal = Proposal((1,), torch.tensor([[0.5, 0.5]]))
    half = 2**23
    assert accept(logits, [proposal], [scripted(half - 1, 0)]) == [[1, 0]]
    assert accept(logits, [proposal], [scripted(half, GREATEST)]) == [[0]]


@pytest.mark.parametrize("number", [0, 1, GREATEST])
def test_a_draft_that_the_main_model_likes_better_is_always_accepted(number: int) -> None:
    logits = log(0.5, 0.3, 0.2).expand(1, 3, 3)
    weights = torch.tensor([[0.6, 0.2, 0.2]] * 2)
    weights = weights / weights.sum(-1, keepdim=True)
    taken = accept(logits, [Proposal((1, 1), weights)], [scripted(number, number, GREATEST)])
    assert taken == [[1, 1, 2]]


@pytest.mark.parametrize("number", [0, 1, GREATEST])
@pytest.mark.parametrize("params", [{"top_k": 2}, {"top_p": 0.6}, {"top_k": 1}], ids=str)
def test_a_draft_outside_the_filter_is_always_rejected(number: int, params: dict) -> None:
    logits = log(0.4, 0.1, 0.5).expand(1, 2, 3)
    for q in (1.0, 1e-30):
        weights = torch.tensor([[0.0, q, 1.0 - q]])
        one = scripted(number, GREATEST, **params)
        assert accept(logits, [Proposal((1,), weights)], [one])[0][0] in (0, 2)
        assert one.random.left == []


def test_supports_without_a_common_token_leave_the_main_models_distribution() -> None:
    logits = log(0.25, 0.75, 0.0, 0.0).expand(1, 2, 4)
    proposal = Proposal((3,), torch.tensor([[0.0, 0.0, 0.5, 0.5]]))
    quarter = 2**22
    assert accept(logits, [proposal], [scripted(0, quarter - 1)]) == [[0]]
    assert accept(logits, [proposal], [scripted(0, quarter)]) == [[1]]


def test_a_draft_of_next_to_no_weight_is_accepted() -> None:
    smallest = torch.finfo(torch.float32).smallest_normal * 2**-23
    weights = torch.tensor([[1.0, smallest]])
    logits = torch.zeros(1, 2, 2)
    assert accept(logits, [Proposal((1,), weights)], [scripted(GREATEST, 0)]) == [[1, 0]]


def test_where_rounding_leaves_no_residual_the_token_is_drawn_from_p() -> None:
    p = torch.tensor([[0.25, 0.75]])
    q = torch.tensor([[0.25, 0.75 + 2**-23]])
    assert torch.equal(residual(p, q), p)
    proposal = Proposal((1,), q)
    assert accept(p.log().expand(1, 2, 2), [proposal], [scripted(GREATEST, 0)]) == [[0]]


def test_nothing_is_rejected_of_what_the_main_model_itself_drafts() -> None:
    chains = Chains.random(6, seed=2)
    same = Chains(chains.main_VV, chains.main_VV)
    requests = [request(seed=n, temperature=0.9, top_p=0.9) for n in range(200)]
    proposals = same.propose([0] * 200, requests, 3)
    assert {len(tokens) for tokens in same.verify([0] * 200, proposals, requests)} == {4}


def test_one_most_likely_token_is_greedy_at_any_temperature() -> None:
    chains = Chains.random(9, seed=4)
    expected = chains.plain([request()], 12)[0]
    for seed in range(20):
        assert chains.drafted([request(seed=seed, temperature=1.7, top_k=1)], 12, 3)[0] == expected


@pytest.mark.parametrize("temperature", [1e-3, 1e-20, 1e-30, 1e-45, 5e-324])
def test_a_temperature_next_to_zero_is_greedy(temperature: float) -> None:
    chains = Chains.random(9, seed=6)
    expected = chains.plain([request()], 12)[0]
    assert chains.plain([request(temperature=temperature)], 12)[0] == expected
    assert chains.drafted([request(temperature=temperature)], 12, 3)[0] == expected


def test_a_vocabulary_of_one_token_has_every_draft_accepted() -> None:
    requests = [request(), request(temperature=1.0), request(temperature=0.5, top_p=0.1, top_k=1)]
    chains = Chains(torch.zeros(1, 1), torch.ones(1, 1))
    assert chains.verify([0] * 3, chains.propose([0] * 3, requests, 2), requests) == [[0] * 3] * 3


def test_without_drafts_a_verify_pass_samples_one_token() -> None:
    logits = torch.randn(3, 1, 5, generator=torch.Generator().manual_seed(1))
    requests = [request(), scripted(0), scripted(GREATEST, top_k=2)]
    proposals = [Proposal((), None), Proposal((), torch.zeros(0, 5)), Proposal((), None)]
    taken = accept(logits, proposals, requests)
    allowed = logits[2, 0].topk(2).indices.tolist()
    assert taken == [[int(logits[0, 0].argmax())], [0], [max(allowed)]]


def test_a_choice_among_some_tokens_holds_for_the_first_token_alone() -> None:
    logits = log(0.7, 0.2, 0.1).expand(2, 3, 3)
    requests = [request(), scripted(0, GREATEST)]
    for one in requests:
        one.allowed_token_ids = (1, 2)
    proposals = [Proposal((1, 0), None), Proposal((0, 0), torch.tensor([[1.0, 0.0, 0.0]] * 2))]
    assert accept(logits, proposals, requests) == [[1, 0, 0], [2]]


def test_a_sampled_request_takes_a_number_a_draft_looked_at_and_one_more() -> None:
    logits = log(0.5, 0.5, 0.0).expand(1, 4, 3)
    weights = torch.tensor([[0.0, 0.5, 0.5]] * 3)
    for tokens, used in (((2, 1, 1), 2), ((1, 2, 1), 3), ((1, 1, 2), 4), ((1, 1, 1), 4)):
        one = scripted(*[0] * 8)
        accept(logits, [Proposal(tokens, weights)], [one])
        assert len(one.random.left) == 8 - used


def test_a_request_does_not_depend_on_its_neighbours() -> None:
    kinds = [{}, *FILTERS, {"temperature": 1.0}, {}]
    chains = Chains.random(12, seed=9)
    together = chains.drafted([request(seed=n, **kind) for n, kind in enumerate(kinds)], 30, 3)
    for n, kind in enumerate(kinds):
        assert chains.drafted([request(seed=n, **kind)], 30, 3) == [together[n]]


def test_logits_and_proposals_are_left_as_they_are() -> None:
    logits, weights = torch.randn(2, 3, 5), torch.rand(2, 5).softmax(-1)
    before = logits.clone(), weights.clone()
    requests = [request(temperature=0.5, top_k=3, top_p=0.5), request()]
    requests[1].allowed_token_ids = (1, 2)
    accept(logits, [Proposal((1, 2), weights), Proposal((1, 2), None)], requests)
    draw(logits[:, 0], requests)
    assert torch.equal(logits, before[0])
    assert torch.equal(weights, before[1])
