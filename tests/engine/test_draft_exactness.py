"""Drafting changes no token: greedy generation is what it is without, whatever the draft knows."""

from __future__ import annotations

from functools import reduce
from operator import add
from typing import TYPE_CHECKING, NamedTuple

import pytest
import torch

from mortise import SamplingParams
from tests.fixtures.drafted_models import (
    CASES,
    FAMILIES,
    NUM_PROMPTS,
    RIGHT,
    WRONG,
    drafting,
    held_out_prompts,
    save_drafted,
    tokens_of,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from mortise import Completion

GREEDY = SamplingParams(max_tokens=16, ignore_eos=True)


class Family(NamedTuple):
    """Two models that differ in their drafts, and what both generate without drafting."""

    models: dict[float, Path]
    prompts: list[list[int]]
    expected: list[tuple[int, ...]]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    folder = tmp_path_factory.mktemp(request.param)
    models = {
        chance: save_drafted(folder / str(chance), model_type=request.param, chance=chance)
        for chance in (RIGHT, WRONG)
    }
    plain = drafting(models[RIGHT])
    prompts = held_out_prompts(plain.tokenizer)
    return Family(models, prompts, tokens_of(plain.generate(prompts, GREEDY)))


def compared(
    family: Family, chance: float, num_tokens: int, seqs: int, places: Sequence[int]
) -> list[Completion]:
    """Some of the prompts, continued with drafting and found to be continued as without."""
    llm = drafting(family.models[chance], num_tokens, seqs=seqs)
    completions = llm.generate([family.prompts[place] for place in places], GREEDY)
    for place, completion in zip(places, completions, strict=True):
        assert completion.token_ids == family.expected[place], f"prompt {place}"
    llm._engine.scheduler.check_integrity()
    return completions


@pytest.mark.parametrize("chance", [RIGHT, WRONG], ids=["right", "wrong"])
def test_every_prompt_is_continued_as_without_drafting(family: Family, chance: float) -> None:
    """Two hundred prompts, fifty for each number of drafts, ten of them one by one."""
    assert len(family.prompts) == NUM_PROMPTS == sum(len(places) for *_, places in CASES)
    for num_tokens, seqs, places in CASES:
        completions = compared(family, chance, num_tokens, seqs, places)
        drafted = reduce(add, [one.drafting for one in completions])
        assert len(drafted.accepted_by_place) == num_tokens
        assert drafted.drafted == num_tokens * drafted.steps
        if chance == RIGHT:
            assert drafted.accepted_by_place[0] > 0.5 * drafted.steps
            assert 0 < drafted.accepted_by_place[-1] < drafted.steps
        else:
            assert sum(drafted.accepted_by_place) < 0.1 * drafted.drafted


@pytest.mark.slow
@pytest.mark.parametrize("chance", [RIGHT, WRONG], ids=["right", "wrong"])
def test_every_prompt_for_every_number_of_drafts(family: Family, chance: float) -> None:
    for num_tokens in (1, 2, 3, 4):
        compared(family, chance, num_tokens, 8, range(NUM_PROMPTS))


def test_logprobs_are_those_without_drafting(family: Family) -> None:
    """Of the same tokens, from passes of other shapes: up to the order of sums."""
    params = SamplingParams(max_tokens=12, ignore_eos=True, logprobs=5)
    prompts = family.prompts[:28]
    plain = drafting(family.models[RIGHT]).generate(prompts, params)
    found = drafting(family.models[RIGHT], 3).generate(prompts, params)
    for ours, theirs in zip(found, plain, strict=True):
        assert ours.logprobs is not None
        assert theirs.logprobs is not None
        assert len(ours.logprobs) == len(ours.token_ids) == len(theirs.logprobs)
        torch.testing.assert_close(
            torch.tensor([[one.token, *(value for _, value in one.top)] for one in ours.logprobs]),
            torch.tensor(
                [[one.token, *(value for _, value in one.top)] for one in theirs.logprobs]
            ),
            atol=1e-4,
            rtol=0,
        )
