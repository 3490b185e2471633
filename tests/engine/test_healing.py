"""A healed prompt goes on within its last token, and nothing of its text is lost or said twice."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from mortise import LLM, EngineConfig, SamplingParams
from mortise.config import CacheConfig, SchedulerConfig
from mortise.engine.prompts import Prompt
from mortise.engine.sampler import constrained
from mortise.errors import RequestError
from tests.fixtures.tiny_models import BOS, EOS, VOCABULARY_SIZE, save_tiny

if TYPE_CHECKING:
    from pathlib import Path

    from mortise import Completion

PAIRS = (
    *((b")", b":"), (b"):", b"\n"), (b"):\n", b"\n"), (b"i", b"f"), (b"if", b"x"), (b"r", b"e")),
    # These end or begin within a character: é is C3 A9, and 中 is E4 B8 AD.
    *((b"\xa9", b"a"), (b"\xb8", b"\xad"), (b"\xb8\xad", b")"), (b"x", b"\xc3")),
    # The chat template ends with the first half of this.
    (b">", b"\n"),
)
"""What each token of several bytes is made of."""
LETTERS = "):\nifxreaé中"
HEALED = SamplingParams(max_tokens=10, token_healing=True)
PROMPTS = ["if x):", "ré", "x", "中", "):\n" * 30, "re", "a"]


def save_merging(path: Path) -> Path:
    """A random model with a vocabulary of bytes and the tokens of ``PAIRS``."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = bytes_to_unicode()
    vocabulary = {letter: number for number, letter in enumerate(sorted(letters.values()))}
    vocabulary |= {BOS: 256, EOS: 257}
    merges = [tuple("".join(letters[byte] for byte in part) for part in pair) for pair in PAIRS]
    vocabulary |= {first + second: 258 + n for n, (first, second) in enumerate(merges)}
    own = Backend(models.BPE(vocab=vocabulary, merges=merges))
    own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    own.decoder = decoders.ByteLevel()
    own.add_special_tokens([AddedToken(BOS), AddedToken(EOS)])
    own.post_processor = processors.TemplateProcessing(
        single=[BOS, "$A"], special_tokens=[(BOS, 256)]
    )
    save_tiny(path)
    own.save(str(path / "tokenizer.json"))
    return path


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_merging(tmp_path_factory.mktemp("merging"))


@pytest.fixture(scope="module")
def llm(directory: Path) -> LLM:
    return LLM(EngineConfig(model=directory, dtype="float32"))


def bytes_of() -> dict[int, bytes]:
    """The bytes of every token of :func:`save_merging` that is not special."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = {letter: byte for byte, letter in bytes_to_unicode().items()}
    single = {n: bytes([letters[letter]]) for n, letter in enumerate(sorted(letters))}
    return single | {258 + n: first + second for n, (first, second) in enumerate(PAIRS)}


def check(llm: LLM, completion: Completion) -> None:
    """What holds for every completion of a text, healed or not."""
    prompt, text = completion.prompt, completion.text
    assert prompt is not None
    assert text is not None
    assert llm.tokenizer.decode([*completion.prompt_token_ids, *completion.token_ids]) == (
        prompt + text
    )
    encoded, table = llm.tokenizer.encode(prompt), bytes_of()
    last = table[encoded[-1]]
    begin_alike = {token for token, piece in table.items() if piece.startswith(last)}
    if len(begin_alike) == 1:
        assert completion.healed_token_id is None
        assert list(completion.prompt_token_ids) == encoded
    else:
        assert [*completion.prompt_token_ids, completion.healed_token_id] == encoded
        assert completion.token_ids[0] in begin_alike
    assert completion.timings.prompt_tokens == len(completion.prompt_token_ids)
    assert completion.timings.generated_tokens == len(completion.token_ids)


@settings(max_examples=60, deadline=None)
@given(
    prompt=st.text(LETTERS, min_size=1, max_size=8),
    temperature=st.sampled_from([0.0, 0.7, 5.0]),
    top_p=st.sampled_from([1.0, 0.8]),
    top_k=st.sampled_from([0, 1, 8]),
    seed=st.integers(0, 2**31),
)
def test_the_completion_begins_with_what_was_cut_and_does_not_repeat_it(
    llm: LLM, prompt: str, temperature: float, top_p: float, top_k: int, seed: int
) -> None:
    asked = replace(HEALED, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
    generation = llm.stream(prompt, asked)
    streamed = "".join(event.text for event in generation)
    (completion,) = generation.completions()
    assert streamed == completion.text
    check(llm, completion)


def test_greedy_takes_the_best_token_that_begins_alike_and_then_goes_on(llm: LLM) -> None:
    table = bytes_of()
    healed = [one for one in llm.generate(PROMPTS, HEALED) if one.healed_token_id is not None]
    assert len(healed) == 5
    for completion in healed:
        read, cut = list(completion.prompt_token_ids), completion.healed_token_id
        logits = llm.logits(read)[-1].tolist()
        first = max(
            (token for token, piece in table.items() if piece.startswith(table[cut])),
            key=logits.__getitem__,
        )
        (rest,) = llm.generate([[*read, first]], SamplingParams(max_tokens=9))
        assert completion.token_ids == (first, *rest.token_ids)


def test_without_it_and_where_it_has_no_place_everything_is_as_before(llm: LLM) -> None:
    plain = SamplingParams(max_tokens=10, temperature=0.9, seed=3)
    asked = replace(plain, token_healing=True)
    for prompt in PROMPTS:
        token_ids = llm.tokenizer.encode(prompt)
        (expected,) = llm.generate(token_ids, plain)
        given_otherwise = [
            llm.generate(prompt, plain)[0],
            llm.generate(token_ids, asked)[0],
            llm.generate(Prompt(tuple(token_ids), prompt), asked)[0],
        ]
        for completion in given_otherwise:
            assert completion.token_ids == expected.token_ids
            assert completion.text == expected.text
            assert completion.prompt_token_ids == tuple(token_ids)
            assert completion.healed_token_id is None


def test_a_conversation_is_not_healed(llm: LLM) -> None:
    prompt = llm.chat_prompt([{"role": "user", "content": "x"}])
    assert len(llm.tokenizer.extensions(prompt.token_ids[-1])) == 2
    (completion,) = llm.generate(prompt, HEALED)
    assert completion.healed_token_id is None
    assert completion.prompt_token_ids == prompt.token_ids


def test_batched_chunked_and_preempted_equal_single(directory: Path, llm: LLM) -> None:
    prompts = [(prompt * 20)[-40:] for prompt in PROMPTS]
    params = [replace(HEALED, max_tokens=60, temperature=1.0, seed=n) for n in range(len(prompts))]
    alone = [
        llm.generate(prompt, one)[0].token_ids for prompt, one in zip(prompts, params, strict=True)
    ]
    assert [one.token_ids for one in llm.generate(prompts, params)] == alone
    small = LLM(
        EngineConfig(
            model=directory,
            dtype="float32",
            cache=CacheConfig(num_pages=3),
            scheduler=SchedulerConfig(max_num_seqs=3, max_num_batched_tokens=7),
        )
    )
    generation = small.stream(prompts, params)
    assert [one.token_ids for one in generation.completions()] == alone
    assert sum(request.num_preemptions for request in generation._requests) > 0


def test_logprobs_are_the_models_own_and_not_those_of_the_choice(llm: LLM) -> None:
    (completion,) = llm.generate("if x):", replace(HEALED, logprobs=2))
    expected = llm.logits([*completion.prompt_token_ids, *completion.token_ids])
    expected = expected[len(completion.prompt_token_ids) - 1 : -1].log_softmax(dim=-1)
    assert completion.logprobs is not None
    for entry, token_id, row in zip(
        completion.logprobs, completion.token_ids, expected, strict=True
    ):
        assert entry.token == pytest.approx(float(row[token_id]), abs=1e-4)
        assert [token for token, _ in entry.top] == row.topk(2).indices.tolist()


def test_a_stop_text_is_looked_for_in_what_is_new(llm: LLM) -> None:
    (whole,) = llm.generate("if x):", HEALED)
    assert whole.text
    within_prompt = ("):", "x)")
    (other,) = llm.generate("if x):", replace(HEALED, stop=within_prompt))
    ends = [whole.text.find(stop) for stop in within_prompt if stop in whole.text]
    assert other.text == whole.text[: min(ends, default=None)]
    stop = whole.text[0]
    (cut,) = llm.generate("if x):", replace(HEALED, stop=stop))
    assert (cut.text, cut.stopped_by) == ("", stop)


def test_a_token_that_would_end_the_completion_is_not_chosen_again(llm: LLM) -> None:
    *_, last = llm.tokenizer.encode("if x):")
    (completion,) = llm.generate("if x):", replace(HEALED, stop_token_ids=[last]))
    assert completion.healed_token_id is None


@pytest.mark.parametrize("prompt", ["if x):", "ré"])
def test_a_stop_token_in_its_place_adds_nothing(llm: LLM, prompt: str) -> None:
    (whole,) = llm.generate(prompt, HEALED)
    first = whole.token_ids[0]
    assert first != whole.healed_token_id
    (ended,) = llm.generate(prompt, replace(HEALED, stop_token_ids=[first]))
    assert ended.healed_token_id == whole.healed_token_id
    assert (ended.text, ended.stopped_by, ended.token_ids) == ("", first, (first,))


def test_the_only_token_is_not_cut_unless_one_begins_the_text(llm: LLM) -> None:
    (begun,) = llm.generate("if", HEALED)
    assert begun.prompt_token_ids == (256,)
    assert begun.healed_token_id is not None
    alone = Prompt((begun.healed_token_id,), "if", is_plain_text=True)
    (completion,) = llm.generate(alone, HEALED)
    assert completion.healed_token_id is None
    assert completion.prompt_token_ids == alone.token_ids


def test_limits_are_those_of_the_whole_prompt(llm: LLM) -> None:
    prompt = "a" * 509 + "if"
    assert len(llm.tokenizer.encode(prompt)) == 511
    (completion,) = llm.generate(prompt, replace(HEALED, max_tokens=None))
    assert len(completion.token_ids) == 1
    for healing in (True, False):
        with pytest.raises(RequestError, match="the prompt has 511 tokens and max_tokens is 2"):
            llm.generate(prompt, SamplingParams(max_tokens=2, token_healing=healing))


def test_what_is_not_allowed_is_impossible_and_the_rest_unchanged() -> None:
    logits = torch.randn(3, 9, generator=torch.Generator().manual_seed(0))
    before = logits.clone()
    allowed = [None, (4, 2), None]
    requests = [SimpleNamespace(allowed_token_ids=one) for one in allowed]
    found = constrained(logits, requests)
    assert torch.equal(logits, before)
    assert torch.equal(found[[0, 2]], logits[[0, 2]])
    expected = torch.full((9,), -torch.inf)
    expected[[4, 2]] = logits[1, [4, 2]]
    assert torch.equal(found[1], expected)
    assert constrained(logits[:1], requests[:1]).data_ptr() == logits.data_ptr()


def test_the_vocabulary_is_what_these_tests_need(llm: LLM) -> None:
    table = bytes_of()
    assert max(table) < VOCABULARY_SIZE
    pieces = [table[token] for token in llm.tokenizer.encode("if x中é):\n")[1:]]
    assert pieces == [b"if", b" ", b"x", b"\xe4", b"\xb8\xad", b"\xc3", b"\xa9", b"):\n"]
