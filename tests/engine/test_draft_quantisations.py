"""Whatever main model and draft are quantised to, drafting changes no token."""

from __future__ import annotations

from functools import reduce
from operator import add
from typing import TYPE_CHECKING

import pytest

from mortise import SamplingParams
from mortise.spec.roles import ModelRole
from tests.cli.command_line import mortise
from tests.fixtures.drafted_models import (
    CASES,
    RIGHT,
    drafting,
    held_out_prompts,
    save_drafted,
    tokens_of,
)
from tests.fixtures.quantised_drafts import NONE, PAIRS, Pair, draft_scheme, save_pairs

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from mortise import LLM

GREEDY = SamplingParams(max_tokens=6, ignore_eos=True)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Mapping[tuple[str, str], Pair]:
    folder = tmp_path_factory.mktemp("pairs")
    return save_pairs(folder, model_type="deepseek_v32", chance=RIGHT)


def load(pair: Pair, num_tokens: int = 0, seqs: int = 8) -> LLM:
    """In the type of the checkpoint, in which a row's sums do not hang on the rows beside it."""
    return drafting(
        pair.model, num_tokens, seqs=seqs, dtype="bfloat16", draft={"model": pair.draft}
    )


def stored(llm: LLM, role: ModelRole) -> set[str]:
    """Number formats of a role's projections."""
    values = [one.value for one in llm.decisions if one.role is role]
    return {value.split()[-1].replace("_", "-") for value in values if " projections " in value}


@pytest.mark.parametrize(("main", "draft"), PAIRS)
def test_every_prompt_is_continued_as_without_drafting(
    pairs: Mapping[tuple[str, str], Pair], main: str, draft: str
) -> None:
    """Two hundred prompts, fifty for each number of drafts, ten of them one by one."""
    pair = pairs[main, draft]
    plain = load(pair)
    prompts = held_out_prompts(plain.tokenizer)
    expected = tokens_of(plain.generate(prompts, GREEDY))
    accepted = []
    for num_tokens, seqs, places in CASES:
        llm = load(pair, num_tokens, seqs)
        assert stored(llm, ModelRole.MAIN) == {main} - {"bf16"}
        assert stored(llm, ModelRole.DRAFT) == {draft_scheme(main, draft)} - {"bf16"}
        found = llm.generate([prompts[place] for place in places], GREEDY)
        differing = [
            place
            for place, one in zip(places, found, strict=True)
            if one.token_ids != expected[place]
        ]
        assert not differing, f"{len(differing)} prompts of {len(found)}"
        accepted += [one.drafting for one in found]
    total = reduce(add, accepted)
    assert total.accepted_by_place[0] > 0.3 * total.steps


@pytest.mark.parametrize(("main", "draft"), [pair for pair in PAIRS if pair[1] != NONE])
def test_the_command_line_says_the_same_with_and_without(
    pairs: Mapping[tuple[str, str], Pair], main: str, draft: str
) -> None:
    options = ("--temperature", "0", "--max-tokens", "8", "--json")
    arguments = ("generate", "def f(", "--prompt", "import", *options)
    plain = mortise(*arguments, "--model", pairs[main, draft].model)
    drafted = mortise(*arguments, *pairs[main, draft].options, "--draft", "2")
    assert (plain.code, drafted.code) == (0, 0), drafted.stderr
    texts = [
        [one["token_ids"] for one in outcome.document["completions"]]
        for outcome in (plain, drafted)
    ]
    assert texts[0] == texts[1]
    assert all(one["drafting"]["drafted"] for one in drafted.document["completions"])


def test_a_draft_of_another_model_is_refused(tmp_path: Path) -> None:
    """Its embedding is another one, which the draft could not have been trained on."""
    for name, seed in (("main", 0), ("other", 1)):
        save_drafted(tmp_path / name, model_type="glm4_moe", seed=seed)
    options = ("--model", tmp_path / "main", "--draft-model", tmp_path / "other", "--draft", "1")
    outcome = mortise("generate", "a", *options)
    assert outcome.code == 2
    assert "embed_tokens.weight differs from the main model's embedding" in outcome.stderr
