"""Whatever becomes of a request that drafts, it becomes of the same request without drafting."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import pytest
import torch

from mortise import LLM, SamplingParams
from tests.engine.test_healing import PROMPTS as TO_HEAL
from tests.engine.test_healing import save_merging
from tests.fixtures.drafted_models import drafting, held_out_prompts, save_drafted, tokens_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from mortise import Completion

GREEDY = SamplingParams(max_tokens=16, ignore_eos=True)
FAMILIES = ("deepseek_v32", "glm4_moe", "qwen3_next")
"""An indexer, pages of keys and values alone, states beside them."""


class Pair(NamedTuple):
    """A model, and an engine of it that does not draft."""

    path: Path
    plain: LLM
    prompts: list[list[int]]


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    path = save_drafted(tmp_path_factory.mktemp("drafted") / "model", model_type=request.param)
    plain = drafting(path)
    return Pair(path, plain, held_out_prompts(plain.tokenizer, 14))


def facts(completions: Sequence[Completion]) -> list[tuple[object, ...]]:
    """All that must not change when a request drafts."""
    return [
        (
            one.prompt_token_ids,
            one.healed_token_id,
            one.token_ids,
            one.text,
            one.finish_reason,
            one.stopped_by,
            one.timings.generated_tokens,
        )
        for one in completions
    ]


def assert_same(
    pair: Pair, llm: LLM, prompts: Sequence[str | list[int]], params: Sequence[SamplingParams]
) -> list[Completion]:
    """Both engines complete alike, and the one that drafts is whole afterwards."""
    expected = pair.plain.generate(list(prompts), list(params))
    found = llm.generate(list(prompts), list(params))
    assert facts(found) == facts(expected)
    llm._engine.scheduler.check_integrity()
    return found


@pytest.mark.parametrize("num_tokens", [1, 4])
def test_max_tokens_end_within_a_run_of_accepted_drafts(pair: Pair, num_tokens: int) -> None:
    """Wherever the runs of accepted drafts end, every number of tokens is asked for."""
    params = [replace(GREEDY, max_tokens=number) for number in range(1, 13)]
    llm = drafting(pair.path, num_tokens)
    for prompt in pair.prompts[3:6]:
        found = assert_same(pair, llm, [prompt] * len(params), params)
        assert [len(one.token_ids) for one in found] == list(range(1, 13))
        assert max(one.drafting.accepted for one in found) > 1


def test_stop_tokens_end_it_wherever_they_come(pair: Pair) -> None:
    llm = drafting(pair.path, 4)
    for prompt in pair.prompts[3:6]:
        (whole,) = pair.plain.generate([prompt], GREEDY)
        params = [replace(GREEDY, stop_token_ids=[token]) for token in whole.token_ids]
        found = assert_same(pair, llm, [prompt] * len(params), params)
        assert all(one.finish_reason == "stop" for one in found)
        assert {one.stopped_by for one in found} == set(whole.token_ids)


def test_the_models_own_end_of_text_ends_it_within_a_run(pair: Pair, tmp_path: Path) -> None:
    whole = pair.plain.generate(pair.prompts, GREEDY)
    token = whole[4].token_ids[6]
    config = json.loads((pair.path / "config.json").read_text(encoding="utf-8"))
    path = save_drafted(
        tmp_path / "ending", model_type=config["model_type"], eos_token_id=int(token)
    )
    llm, ended = drafting(path, 3), replace(GREEDY, ignore_eos=False)
    found = llm.generate(pair.prompts, ended)
    assert facts(found) == facts(drafting(path).generate(pair.prompts, ended))
    assert found[4].stopped_by == token
    assert tokens_of(llm.generate(pair.prompts, GREEDY)) == tokens_of(whole)


def test_stop_texts_end_it_and_streams_say_nothing_of_them(pair: Pair) -> None:
    llm = drafting(pair.path, 4)
    for prompt in pair.prompts[3:6]:
        (whole,) = pair.plain.generate([prompt], GREEDY)
        assert whole.text is not None
        stops = [whole.text[place : place + 2] for place in range(len(whole.text) - 1)]
        params = [replace(GREEDY, stop=[stop, "nowhere"]) for stop in stops]
        found = assert_same(pair, llm, [prompt] * len(params), params)
        assert any(one.finish_reason == "stop" for one in found)
        generation = llm.stream([prompt] * len(params), params)
        pieces = [""] * len(params)
        for event in generation:
            pieces[event.index] += event.text
        assert pieces == [one.text for one in found]


def test_events_are_those_without_drafting_request_by_request(pair: Pair) -> None:
    """One token each, the finish on the last; only how they are mixed may differ."""
    params = [replace(GREEDY, logprobs=2)] * len(pair.prompts)
    seen: list[dict[int, list[tuple[object, ...]]]] = []
    for llm in (pair.plain, drafting(pair.path, 3)):
        of_request: dict[int, list[tuple[object, ...]]] = {}
        for event in llm.stream(pair.prompts, params):
            assert event.logprobs is not None
            of_request.setdefault(event.index, []).append(
                (event.token_id, event.text, event.finish, [one for one, _ in event.logprobs.top])
            )
        seen.append(of_request)
    assert seen[0] == seen[1]


def test_preempted_requests_generate_the_same(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests of three pages each in six pages; slots go from one to another."""
    prompts = [(prompt * 60)[:60] for prompt in pair.prompts[2:7]]
    params = [replace(GREEDY, max_tokens=75)] * len(prompts)
    preempted = []
    llm = drafting(pair.path, 3, pages=6, chunk=32)
    preempt = llm._engine.scheduler._preempt
    monkeypatch.setattr(
        llm._engine.scheduler,
        "_preempt",
        lambda request: (preempted.append(request.id), preempt(request)),
    )
    assert_same(pair, llm, prompts, params)
    assert preempted


@pytest.mark.parametrize(("chunk", "seqs"), [(1, 8), (7, 3), (64, 2)])
def test_prompts_in_chunks(pair: Pair, chunk: int, seqs: int) -> None:
    """Some prompts are read while others draft."""
    llm = drafting(pair.path, 3, chunk=chunk, seqs=seqs)
    prompts = pair.prompts[:7] if chunk == 1 else pair.prompts
    assert_same(pair, llm, prompts, [GREEDY] * len(prompts))


@pytest.mark.parametrize("num_tokens", [1, 2, 4])
def test_up_to_the_end_of_the_context(pair: Pair, num_tokens: int, tmp_path: Path) -> None:
    """The last tokens leave no room for drafts, and the last of all is never read back."""
    config = json.loads((pair.path / "config.json").read_text(encoding="utf-8"))
    path = save_drafted(
        tmp_path / "short", model_type=config["model_type"], max_position_embeddings=72
    )
    short = pair._replace(path=path, plain=drafting(path))
    prompts = [
        (prompt * 60)[:length] for prompt, length in zip(pair.prompts, range(55, 69), strict=True)
    ]
    params = [replace(GREEDY, max_tokens=72 - len(prompt)) for prompt in prompts]
    assert_same(short, drafting(path, num_tokens), prompts, params)


@pytest.mark.parametrize("num_tokens", [1, 4])
def test_up_to_the_end_of_the_cache(pair: Pair, num_tokens: int) -> None:
    prompts = [
        (prompt * 120)[:length]
        for prompt, length in zip(pair.prompts[2:6], range(113, 117), strict=True)
    ]
    params = [replace(GREEDY, max_tokens=129 - len(prompt)) for prompt in prompts]
    assert_same(pair, drafting(pair.path, num_tokens, pages=2), prompts, params)


def test_requests_of_every_kind_in_one_batch(pair: Pair) -> None:
    """Greedy ones generate what they generate alone, drawn ones too, whoever runs beside them."""
    drawn = replace(GREEDY, temperature=0.8, logprobs=1)
    params = [
        GREEDY,
        replace(drawn, seed=1),
        replace(GREEDY, logprobs=3, stop=["e"]),
        replace(drawn, seed=2, top_k=5),
        replace(drawn, seed=3, top_p=0.7, max_tokens=5),
        replace(drawn, seed=4, top_k=40, top_p=0.9, temperature=2.0),
        replace(GREEDY, max_tokens=3),
    ] * 2
    llm = drafting(pair.path, 3)
    together = llm.generate(pair.prompts, params)
    alone = [
        llm.generate([prompt], one)[0] for prompt, one in zip(pair.prompts, params, strict=True)
    ]
    assert facts(together) == facts(alone)
    greedy = [place for place, one in enumerate(params) if one.temperature == 0.0]
    expected = pair.plain.generate(
        [pair.prompts[place] for place in greedy], [params[place] for place in greedy]
    )
    assert facts([together[place] for place in greedy]) == facts(expected)


def test_prompts_that_come_while_others_run(pair: Pair) -> None:
    llm = drafting(pair.path, 3, seqs=4, chunk=40)
    params = [GREEDY] * 4
    groups = [pair.prompts[:4], pair.prompts[4:8], pair.prompts[8:12]]
    scored = pair.plain.logits(pair.prompts[12])
    generations = []
    for group in groups:
        generations.append(llm.stream(group, params))
        for _ in range(11):
            next(generations[-1])
        torch.testing.assert_close(llm.logits(pair.prompts[12]), scored, atol=1e-5, rtol=0)
    for group, generation in zip(groups, generations, strict=True):
        assert facts(generation.completions()) == facts(pair.plain.generate(group, params))


def test_a_generation_that_is_dropped_leaves_nothing_behind(pair: Pair) -> None:
    llm = drafting(pair.path, 4, pages=12)
    params = [GREEDY] * len(pair.prompts)
    for number in (1, 5, 9, 20, 33):
        generation = llm.stream(pair.prompts, params)
        for _ in range(number):
            next(generation)
        generation.close()
        llm._engine.scheduler.check_integrity()
        assert not llm._engine.has_work
    assert_same(pair, llm, pair.prompts, params)


def test_prompts_are_healed_as_without_drafting(tmp_path: Path) -> None:
    path = save_drafted(tmp_path / "drafted")
    merging = save_merging(tmp_path / "merging")
    (path / "tokenizer.json").write_bytes((merging / "tokenizer.json").read_bytes())
    pair = Pair(path, drafting(path), [])
    params = replace(GREEDY, token_healing=True)
    found = assert_same(pair, drafting(path, 3), TO_HEAL, [params] * len(TO_HEAL))
    assert sum(one.healed_token_id is not None for one in found) == 5
