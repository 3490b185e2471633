"""A text's likelihood is that of each of its tokens, counted once."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mortise import LLM
from mortise.errors import RequestError
from mortise.evaluation.likelihood import score_documents
from mortise.evaluation.score import Score
from mortise.evaluation.texts import Document, read_documents
from mortise.evaluation.windows import windows

if TYPE_CHECKING:
    from pathlib import Path


@given(num_tokens=st.integers(0, 60), length=st.integers(1, 20), data=st.data())
def test_every_token_but_the_first_is_predicted_once(
    num_tokens: int, length: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, length))
    predicted: list[int] = []
    for window in windows(num_tokens, length, stride):
        assert window.end - window.start <= length
        own = range(window.end - window.num_new + 1, window.end + 1)
        assert own.start > window.start
        # Beyond the first window nothing is predicted from fewer tokens than promised.
        assert window.start == 0 or own.start - window.start > length - stride
        predicted += own
    assert predicted == list(range(1, num_tokens))


def test_a_text_within_one_window_has_the_likelihood_of_its_tokens(tiny_model: Path) -> None:
    llm = LLM(model=tiny_model)
    document = Document("one", "def f(x):\n    return x\n" * 6)
    ids = document.token_ids(llm.tokenizer)
    assert (ids[0], ids[-1]) == (256, 257)
    logprobs = llm.logits(ids[:-1]).double().log_softmax(dim=-1)
    expected = -sum(float(logprobs[place, token]) for place, token in enumerate(ids[1:]))

    def score(length: int, stride: int) -> Score:
        return score_documents(llm.logits, [document], [ids], length=length, stride=stride)

    whole = score(512, 256)
    assert whole.nats == pytest.approx(expected, abs=1e-3)
    assert whole.predicted_tokens == len(ids) - 1
    assert whole.text_bytes == len(document.text)
    # Short windows hide what is far away, whichever way that changes the sum.
    assert score(32, 16).nats != pytest.approx(expected, abs=1e-3)
    assert score(32, 16).predicted_tokens == len(ids) - 1


def test_a_model_that_knows_nothing_has_the_size_of_its_vocabulary_as_perplexity() -> None:
    def uniform(token_ids: list[int]) -> torch.Tensor:
        return torch.zeros(len(token_ids), 50)

    documents = [Document("a", "aaaa"), Document("b", "bb")]
    seen = []
    score = score_documents(
        uniform,
        documents,
        [[1, 2, 3, 4], [5, 6]],
        length=2,
        stride=1,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert score.perplexity == pytest.approx(50)
    assert score.nats_per_token == pytest.approx(math.log(50))
    assert score.bits_per_byte == pytest.approx(4 * math.log2(50) / 6)
    assert seen == [(2, 4), (3, 4), (4, 4)]


def test_a_model_that_is_sure_of_everything_else_is_infinitely_perplexed() -> None:
    assert Score(8000.0, 10, 1).perplexity == math.inf
    assert Score(math.inf, 10, 1).perplexity == math.inf
    assert Score(0.0, 10, 1).perplexity == 1.0


def test_documents_are_a_text_or_the_lines_of_a_file(tmp_path: Path) -> None:
    plain = tmp_path / "a.txt"
    plain.write_text("hello\n")
    assert read_documents(plain) == [Document("a.txt", "hello\n")]
    lines = tmp_path / "b.jsonl"
    lines.write_text('{"path": "x.py", "text": "one\u2028two"}\n\n{"text": "three"}\n')
    assert read_documents(lines) == [
        Document("x.py", "one\u2028two"),
        Document("b.jsonl, line 3", "three"),
    ]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.txt", "", "is empty"),
        ("a.jsonl", "{\n", "line 1: not JSON"),
        ("a.jsonl", '{"text": 5}\n', 'line 1: holds {"text": 5}'),
        ("a.jsonl", "[1]\n", r"line 1: holds \[1\]"),
    ],
)
def test_what_is_no_text_is_refused(tmp_path: Path, name: str, text: str, words: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(RequestError, match=words):
        read_documents(tmp_path / name)
    with pytest.raises(RequestError, match="cannot be read"):
        read_documents(tmp_path / "absent.txt")
