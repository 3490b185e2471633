"""The shipped model drafts for itself: it writes the same, in far fewer passes."""

from __future__ import annotations

from functools import cache, reduce
from operator import add
from typing import TYPE_CHECKING

import pytest

from mortise import LLM, EngineConfig, SamplingParams
from tests.fixtures.drafted_models import NUM_PROMPTS, drafting, held_out_prompts, tokens_of

if TYPE_CHECKING:
    from mortise.engine.speculative.statistics import DraftStatistics

GREEDY = SamplingParams(max_tokens=16, ignore_eos=True)
DTYPES = ("bfloat16", "float32")


@cache
def plain(dtype: str) -> tuple[list[list[int]], list[tuple[int, ...]]]:
    """Held-out prompts, and what the model generates without drafting."""
    llm = drafting("builtin", dtype=dtype)
    prompts = held_out_prompts(llm.tokenizer)
    return prompts, tokens_of(llm.generate(prompts, GREEDY))


def drafted(dtype: str, num_tokens: int, seqs: int, places: range) -> DraftStatistics:
    """What became of the drafts of some prompts, which are continued as without drafting."""
    prompts, expected = plain(dtype)
    llm = drafting("builtin", num_tokens, seqs=seqs, dtype=dtype)
    found = llm.generate([prompts[place] for place in places], GREEDY)
    assert tokens_of(found) == [expected[place] for place in places]
    return reduce(add, [one.drafting for one in found if one.drafting is not None])


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_writes_the_same_and_most_first_drafts_are_right(dtype: str) -> None:
    """Two hundred held-out prompts: for each number of drafts 25 alone, 25 beside others."""
    for num_tokens in (1, 2, 3, 4):
        alone = drafted(dtype, num_tokens, 1, range(num_tokens - 1, NUM_PROMPTS, 8))
        beside = drafted(dtype, num_tokens, 8, range(num_tokens + 3, NUM_PROMPTS, 8))
        total = alone + beside
        rates = [accepted / total.steps for accepted in total.accepted_by_place]
        # It was 0.75 to 0.8 of them; of 4096 tokens chance would find next to none.
        assert rates[0] > 0.6
        assert rates == sorted(rates, reverse=True)
        assert rates[-1] > 0.6**num_tokens
        assert total.acceptance_length == pytest.approx(1 + sum(rates))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_prompt_for_every_number_of_drafts(dtype: str) -> None:
    for num_tokens in (1, 2, 3, 4):
        drafted(dtype, num_tokens, 8, range(NUM_PROMPTS))


def test_a_recommendation_to_sample_is_followed_with_drafts() -> None:
    llm = LLM(EngineConfig(draft={"num_tokens": 3}))
    (one,) = llm.generate("def read(self, size=-1):")
    assert one.token_ids
    assert one.drafting is not None
    assert one.drafting.drafted
