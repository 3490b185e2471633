"""The engine's sampled tokens, drafted, have the distribution that the main model's logits say."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np
import pytest

from mortise import SamplingParams
from mortise.engine.speculative import acceptance
from tests.engine.test_acceptance_statistics import FALSE_ALARMS, chance
from tests.engine.token_chains import WRONG_RULES, filtered
from tests.fixtures.drafted_models import drafting, save_drafted

if TYPE_CHECKING:
    from pathlib import Path

    from mortise import LLM

PROMPT = [7, 30, 11, 7, 52]
LENGTH = 4
"""The first token is chosen plainly, the others by drafting."""
KEPT = 3
"""Tokens that may come next, so that every continuation can be listed: 81 of them."""
REQUESTS = 1200


def law(llm: LLM, params: SamplingParams) -> dict[tuple[int, ...], float]:
    """Of all continuations: the logits of whole sequences, filtered by transformers, multiplied."""
    known: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(LENGTH):
        longer: dict[tuple[int, ...], float] = {}
        for tokens, probability in known.items():
            logits_V = llm.logits([*PROMPT, *tokens])[-1]
            next_V = filtered(logits_V.unsqueeze(0), params)[0]
            for token_id in np.flatnonzero(next_V):
                longer[*tokens, int(token_id)] = probability * next_V[token_id]
        known = longer
    return known


def sampling(seed: int) -> SamplingParams:
    """Peaked enough for a wrong rule to show, and the same for every request but for the seed."""
    return SamplingParams(
        temperature=0.8, top_k=KEPT, max_tokens=LENGTH, ignore_eos=True, seed=seed
    )


def chance_of_continuations(path: Path, num_drafts: int) -> float:
    """How probable counts are that fit the law of the same model without a draft no better."""
    expected = law(drafting(path), sampling(0))
    requests = [sampling(seed) for seed in range(REQUESTS)]
    llm = drafting(path, num_drafts, seqs=60)
    completions = llm.generate([PROMPT] * REQUESTS, requests)
    assert sum(one.drafting.accepted for one in completions if one.drafting is not None) > 0
    counts = Counter(completion.token_ids for completion in completions)
    possible = [counts[tokens] for tokens in expected]
    # What the law does not know stands in a place of its own.
    possible.append(REQUESTS - sum(possible))
    return chance(np.array(possible), np.array([*expected.values(), 0.0]))


@pytest.mark.parametrize("num_drafts", [1, 3])
@pytest.mark.parametrize("model_type", ["deepseek_v32", "qwen3_next"])
def test_continuations_come_as_often_as_the_main_models_logits_say(
    model_type: str, num_drafts: int, tmp_path: Path
) -> None:
    path = save_drafted(tmp_path / "model", model_type=model_type, chance=0.3)
    assert chance_of_continuations(path, num_drafts) > FALSE_ALARMS


@pytest.mark.parametrize(
    "rule", ["every draft is accepted", "the token after a rejection is drawn from p"]
)
def test_they_do_not_if_acceptance_is_wrong(
    rule: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(acceptance, *WRONG_RULES[rule])
    assert chance_of_continuations(save_drafted(tmp_path / "model", chance=0.3), 1) < 1e-9
