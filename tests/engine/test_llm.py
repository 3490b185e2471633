"""From Python: prompts in, completions out, the same however the work is cut and batched."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest
import torch

from mortise import LLM, EngineConfig, SamplingParams
from mortise.config import CacheConfig, DispatchConfig, SchedulerConfig, resolve
from mortise.errors import (
    CapacityError,
    ConfigError,
    ModelConfigError,
    PromptTooLongError,
    RequestError,
)
from tests.fixtures.tiny_models import save_tiny, tiny_transformers_model

if TYPE_CHECKING:
    from pathlib import Path

PROMPTS = ["def add(a, b):", "x", "import os\nimport sys\n" * 4, "class A:\n    pass\n"]
GREEDY = SamplingParams(max_tokens=24)


def tiny_llm(path: Path, *, pages: int = 64, seqs: int = 8, tokens: int = 512, **fields) -> LLM:
    return LLM(
        EngineConfig(
            model=path,
            cache=CacheConfig(num_pages=pages),
            scheduler=SchedulerConfig(max_num_seqs=seqs, max_num_batched_tokens=tokens),
            **fields,
        )
    )


@pytest.fixture(scope="module")
def llm(tiny_model: Path) -> LLM:
    return tiny_llm(tiny_model)


@pytest.fixture(scope="module")
def greedy(llm: LLM) -> list[tuple[int, ...]]:
    """The tokens of every prompt, each run by itself."""
    return [llm.generate(prompt, GREEDY)[0].token_ids for prompt in PROMPTS]


def test_greedy_tokens_are_those_of_transformers(llm: LLM, greedy: list[tuple[int, ...]]) -> None:
    oracle = tiny_transformers_model()
    for prompt, found in zip(PROMPTS, greedy, strict=True):
        ids = torch.tensor([llm.tokenizer.encode(prompt)])
        expected = oracle.generate(ids, max_new_tokens=24, do_sample=False)
        assert list(found) == expected[0, ids.shape[1] :].tolist()


def test_batched_equals_single(llm: LLM, greedy: list[tuple[int, ...]]) -> None:
    assert [completion.token_ids for completion in llm.generate(PROMPTS, GREEDY)] == greedy


def test_chunked_and_preempted_equals_whole(
    tiny_model: Path, greedy: list[tuple[int, ...]]
) -> None:
    small = tiny_llm(tiny_model, pages=3, seqs=3, tokens=7)
    generation = small.stream(PROMPTS, GREEDY)
    assert [completion.token_ids for completion in generation.completions()] == greedy


def test_preempted_equals_undisturbed(llm: LLM, tiny_model: Path) -> None:
    prompts, params = ["a" * 50, "b" * 50, "c" * 50], SamplingParams(max_tokens=90)
    small = tiny_llm(tiny_model, pages=5)
    generation = small.stream(prompts, params)
    found = [completion.token_ids for completion in generation.completions()]
    assert sum(request.num_preemptions for request in generation._requests) > 0
    assert found == [completion.token_ids for completion in llm.generate(prompts, params)]


def test_logits_are_those_of_transformers(llm: LLM, tiny_model: Path) -> None:
    ids = torch.randint(0, 272, (1, 150), generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        expected = tiny_transformers_model()(ids).logits[0]
    whole = llm.logits(ids[0].tolist())
    chunked = tiny_llm(tiny_model, tokens=33).logits(ids[0])
    assert whole.dtype == torch.float32
    assert whole.shape == (150, 272)
    assert (whole - expected).abs().max() < 1e-4
    assert (chunked - whole).abs().max() < 1e-4


def test_logits_give_their_pages_back_and_are_ordinary_tensors(llm: LLM) -> None:
    before = llm._engine._allocator.num_free
    logits = llm.logits([1, 2, 3])
    assert llm._engine._allocator.num_free == before
    assert not logits.is_inference()
    assert torch.equal(llm.logits((1, 2, 3)), logits)


def test_logits_predict_what_greedy_takes(llm: LLM, greedy: list[tuple[int, ...]]) -> None:
    ids = [*llm.tokenizer.encode(PROMPTS[0]), *greedy[0]]
    best = llm.logits(ids[:-1]).argmax(dim=-1).tolist()
    assert best[-len(greedy[0]) :] == list(greedy[0])


def test_a_seed_decides_and_the_batch_does_not(llm: LLM) -> None:
    def sampled(seed: int) -> SamplingParams:
        return SamplingParams(max_tokens=16, temperature=1.0, top_p=0.9, seed=seed)

    alone = [llm.generate(prompt, sampled(n))[0].token_ids for n, prompt in enumerate(PROMPTS)]
    together = llm.generate(PROMPTS, [sampled(n) for n in range(len(PROMPTS))])
    assert [completion.token_ids for completion in together] == alone
    assert llm.generate(PROMPTS[0], sampled(99))[0].token_ids != alone[0]


def test_a_seed_that_was_drawn_is_reported_and_repeats_the_run(llm: LLM) -> None:
    (first,) = llm.generate(PROMPTS[0], SamplingParams(max_tokens=16, temperature=1.0))
    (again,) = llm.generate(
        PROMPTS[0], SamplingParams(max_tokens=16, temperature=1.0, seed=first.seed)
    )
    (other,) = llm.generate(PROMPTS[0], SamplingParams(max_tokens=16, temperature=1.0))
    assert again.token_ids == first.token_ids
    assert other.seed != first.seed


def test_text_and_tokens_say_the_same(llm: LLM) -> None:
    for completion in llm.generate(PROMPTS, GREEDY):
        text = llm.tokenizer.decode([*completion.prompt_token_ids, *completion.token_ids])
        assert completion.prompt is not None
        assert completion.text is not None
        assert text == completion.prompt + completion.text
        assert completion.finish_reason == "length"
        assert completion.stopped_by is None
        assert completion.timings.generated_tokens == 24


def test_tokens_arrive_one_at_a_time_and_add_up(llm: LLM) -> None:
    generation = llm.stream(PROMPTS, GREEDY)
    events = list(generation)
    completions = generation.completions()
    for completion in completions:
        own = [event for event in events if event.index == completion.index]
        assert tuple(event.token_id for event in own) == completion.token_ids
        assert "".join(event.text for event in own) == completion.text
        assert [event.finish is not None for event in own] == [False] * 23 + [True]


def test_a_stop_text_ends_and_is_left_out(llm: LLM) -> None:
    (whole,) = llm.generate(PROMPTS[0], GREEDY)
    assert whole.text is not None
    # Half a character is shown as U+FFFD at the end alone: take a text that was certain.
    stop = next(letter for letter in whole.text[2:] if letter != "\N{REPLACEMENT CHARACTER}")
    (cut,) = llm.generate(PROMPTS[0], SamplingParams(max_tokens=24, stop=("never", stop)))
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert (cut.finish_reason, cut.stopped_by) == ("stop", stop)
    assert len(cut.token_ids) < 24
    assert cut.token_ids == whole.token_ids[: len(cut.token_ids)]


def test_a_stop_token_ends_and_gives_no_text(llm: LLM, greedy: list[tuple[int, ...]]) -> None:
    stop = greedy[0][5]
    end = greedy[0].index(stop) + 1
    (cut,) = llm.generate(PROMPTS[0], SamplingParams(max_tokens=24, stop_token_ids=[stop]))
    assert (cut.finish_reason, cut.stopped_by) == ("stop", stop)
    assert cut.token_ids == greedy[0][:end]
    assert cut.text == llm.tokenizer.decode(greedy[0][: end - 1])


def test_the_end_of_text_token_ends_unless_ignored(
    tmp_path: Path, llm: LLM, greedy: list[tuple[int, ...]]
) -> None:
    ending = save_tiny(tmp_path / "ending", eos_token_id=greedy[0][5])
    end = greedy[0].index(greedy[0][5]) + 1
    other = tiny_llm(ending)
    (stopped,) = other.generate(PROMPTS[0], GREEDY)
    assert (stopped.finish_reason, stopped.token_ids) == ("stop", greedy[0][:end])
    (ignored,) = other.generate(PROMPTS[0], SamplingParams(max_tokens=24, ignore_eos=True))
    assert ignored.token_ids == greedy[0]


def test_logprobs_are_the_models_own(llm: LLM) -> None:
    (completion,) = llm.generate(
        PROMPTS[0], SamplingParams(max_tokens=6, temperature=3.0, top_k=50, seed=1, logprobs=3)
    )
    ids = [*completion.prompt_token_ids, *completion.token_ids]
    expected = llm.logits(ids[:-1])[-6:].log_softmax(dim=-1)
    assert completion.logprobs is not None
    for entry, token_id, row in zip(
        completion.logprobs, completion.token_ids, expected, strict=True
    ):
        assert entry.token == pytest.approx(float(row[token_id]), abs=1e-4)
        assert [token for token, _ in entry.top] == row.topk(3).indices.tolist()
        values = [value for _, value in entry.top]
        assert values == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)
    assert llm.generate(PROMPTS[0], SamplingParams(max_tokens=1))[0].logprobs is None


def test_generations_under_way_at_once_do_not_mix(llm: LLM, greedy: list[tuple[int, ...]]) -> None:
    first, second = llm.stream(PROMPTS[:2], GREEDY), llm.stream(PROMPTS[2:], GREEDY)
    for _ in range(5):
        next(first)
        next(second)
    found = [*second.completions(), *first.completions()]
    assert [completion.token_ids for completion in found] == [*greedy[2:], *greedy[:2]]


def test_leaving_early_frees_everything(llm: LLM) -> None:
    before = llm._engine._allocator.num_free
    for _ in llm.stream(PROMPTS, GREEDY):
        break
    assert not llm._engine.has_work
    assert llm._engine._allocator.num_free == before
    generation = llm.stream(PROMPTS, GREEDY)
    next(generation)
    generation.close()
    assert not llm._engine.has_work


def test_a_generation_that_is_never_read_costs_nothing(llm: LLM) -> None:
    llm.stream(PROMPTS, GREEDY)
    assert not llm._engine.has_work


def test_one_bad_prompt_stops_all_before_anything_runs(llm: LLM) -> None:
    with pytest.raises(PromptTooLongError):
        llm.generate(["fine", "x" * 600])
    assert not llm._engine.has_work


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        (5, r"a prompt is 5 \(int\)"),
        (b"abc", r"a prompt is b'abc' \(bytes\)"),
        ([{}], r"a prompt is {} \(dict\)"),
        ([[1.5]], r"a prompt is \[1.5\] \(list\)"),
        ([[]], r"a prompt is \[\] \(list\)"),
        ([""], "the prompt is empty"),
        ([[1, 272]], "token 1 of the prompt is 272"),
    ],
)
def test_what_is_no_prompt_is_refused(llm: LLM, prompts: object, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        llm.generate(prompts)


def test_prompts_come_in_many_shapes(llm: LLM, greedy: list[tuple[int, ...]]) -> None:
    ids = llm.tokenizer.encode(PROMPTS[0])
    for prompts in (ids, tuple(ids), [ids], torch.tensor(ids), [PROMPTS[0]], (PROMPTS[0],)):
        (completion,) = llm.generate(prompts, GREEDY)
        assert completion.token_ids == greedy[0]
    assert llm.generate([]) == []
    with pytest.raises(RequestError, match="2 sampling parameters are given for 1 prompts"):
        llm.generate("x", [GREEDY, GREEDY])


def test_logits_refuse_what_exceeds_context_or_cache(llm: LLM, tiny_model: Path) -> None:
    assert llm.logits([1] * 512).shape == (512, 272)
    with pytest.raises(PromptTooLongError, match="the sequence has 513 tokens"):
        llm.logits([1] * 513)
    with pytest.raises(CapacityError, match="3 cache pages wanted, 2 of 2 free"):
        tiny_llm(tiny_model, pages=2).logits([1] * 129)


def test_a_directory_without_tokenizer_serves_token_ids(
    tiny_model: Path, tmp_path: Path, llm: LLM, greedy: list[tuple[int, ...]]
) -> None:
    bare = shutil.copytree(
        tiny_model, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*")
    )
    other = tiny_llm(bare)
    (completion,) = other.generate(llm.tokenizer.encode(PROMPTS[0]), GREEDY)
    assert (completion.token_ids, completion.text) == (greedy[0], None)
    assert torch.equal(other.logits([1, 2]), llm.logits([1, 2]))
    with pytest.raises(RequestError, match=r"is a text .*has no tokenizer\.json"):
        other.generate("text")
    with pytest.raises(ModelConfigError, match="stop texts are given"):
        other.generate([1, 2], SamplingParams(stop="x"))


def test_a_conversation_becomes_a_prompt(llm: LLM) -> None:
    prompt = llm.chat_prompt([{"role": "user", "content": "Hi"}])
    assert prompt.text == "<|bos|><user>Hi\n<assistant>"
    assert prompt.token_ids[0] == 256
    (completion,) = llm.generate(prompt, GREEDY)
    assert completion.prompt_token_ids == prompt.token_ids


def test_every_decision_is_told_with_its_reason(tiny_model: Path) -> None:
    resolved = resolve([("file engine.toml", {"model": str(tiny_model), "dtype": "bfloat16"})])
    llm = LLM(resolved)
    by_subject = {decision.subject: decision for decision in llm.decisions}
    assert by_subject["dtype"].value == "bfloat16"
    assert by_subject["dtype"].source == "file engine.toml"
    assert by_subject["backend"].value.startswith("reference")
    assert by_subject["model.layers.1.mlp"].value.startswith("bf16")
    assert by_subject["cache"].reason == "cache.max_num_tokens is 8192; a page is 64 tokens"
    assert all(decision.reason for decision in llm.decisions)
    (completion,) = llm.generate([1, 2, 3], SamplingParams(max_tokens=2))
    assert len(completion.token_ids) == 2


def test_an_override_is_a_decision_with_its_source(tiny_model: Path) -> None:
    llm = LLM(model=tiny_model, dtype="bfloat16", dispatch=DispatchConfig(dtype="bf16"))
    decision = next(d for d in llm.decisions if d.subject == "model.layers.1.mlp")
    assert (decision.rule, decision.source) == ("override", "Python")


def test_a_configuration_and_fields_at_once_are_refused(tiny_model: Path) -> None:
    with pytest.raises(ConfigError, match="beside it backend"):
        LLM(EngineConfig(model=tiny_model), backend="reference")


def test_a_cache_that_no_machine_has_is_refused(tiny_model: Path) -> None:
    with pytest.raises(CapacityError) as caught:
        LLM(model=tiny_model, cache=CacheConfig(num_pages=10**12))
    assert "a cache of 1000000000000 pages needs" in caught.value.what
    assert "TiB" in caught.value.what
    assert "cache.max_num_tokens" in str(caught.value.remedy)


def test_weights_are_held_once_in_the_runs_dtype(tiny_model: Path) -> None:
    before = torch.get_default_dtype()
    llm = LLM(model=tiny_model, dtype="bfloat16")
    model = llm.loaded.model
    assert isinstance(model, torch.nn.Module)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in model.parameters())
    biases = [b for name, b in model.named_buffers() if name.endswith("e_score_correction_bias")]
    assert {bias.dtype for bias in biases} == {torch.float32}
    assert torch.get_default_dtype() == before


def test_threads_are_set_while_it_runs_and_given_back(tiny_model: Path) -> None:
    seen = []
    llm = LLM(model=tiny_model, threads=torch.get_num_threads() + 1)
    run = llm.loaded.model.run

    def spy(*arguments: object) -> torch.Tensor:
        seen.append(torch.get_num_threads())
        return run(*arguments)

    llm.loaded.model.run = spy
    before = torch.get_num_threads()
    llm.generate([1], SamplingParams(max_tokens=1))
    assert seen == [before + 1]
    assert torch.get_num_threads() == before
