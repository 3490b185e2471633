"""The counting baselines, against a computation with dictionaries."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from typing import TYPE_CHECKING

import numpy as np
import pytest
from safetensors.numpy import save_file

from mortise.errors import CorruptFileError, ModelNotFoundError
from mortise.evaluation.ngrams import (
    Ngrams,
    bigram_probabilities,
    ngram_scores,
    unigram_probabilities,
)

if TYPE_CHECKING:
    from pathlib import Path

VOCABULARY, BOS, EOS = 8, 0, 1
TRAINING = [[BOS, 2, 3, 2, 4, EOS], [BOS, 2, 3, 3, 5, EOS], [BOS, 4, 2, 3, EOS]]
TEXTS = [[BOS, 2, 3, 2, 6, EOS], [BOS, 7, 7, EOS]]


def predictions(texts: list[list[int]]) -> list[tuple[int, int]]:
    return [pair for ids in texts for pair in itertools.pairwise(ids)]


@pytest.fixture
def ngrams(tmp_path: Path) -> Ngrams:
    """Counts of the training texts in the layout of the published file."""
    pairs = Counter(predictions(TRAINING))
    ordered = sorted(pairs)
    columns = [target for _, target in ordered]
    counts = [pairs[pair] for pair in ordered]
    contexts = Counter(context for context, _ in ordered)
    followers = [contexts[token] for token in range(VOCABULARY)]
    unigrams = Counter(target for _, target in predictions(TRAINING))
    path = tmp_path / "ngrams.safetensors"
    save_file(
        {
            "unigrams": np.array([unigrams[token] for token in range(VOCABULARY)], np.int32),
            "bigram_offsets": np.array([0, *np.cumsum(followers)], np.int32),
            "bigram_columns": np.array(columns, np.uint16),
            "bigram_counts": np.array(counts, np.uint16),
        },
        path,
    )
    return Ngrams.load(path)


def unigram(token: int) -> float:
    counts = Counter(target for _, target in predictions(TRAINING))
    total = sum(counts.values()) + VOCABULARY - 1
    return 0.0 if token == BOS else (counts[token] + 1) / total


def bigram(context: int, token: int) -> float:
    counts = Counter(predictions(TRAINING))
    followers = [pair for pair in counts if pair[0] == context]
    if not followers:
        return unigram(token)
    total = sum(counts[pair] for pair in followers)
    return (counts[context, token] + len(followers) * unigram(token)) / (total + len(followers))


def test_unigrams_are_smoothed_and_sum_to_one(ngrams: Ngrams) -> None:
    found = unigram_probabilities(ngrams, BOS)
    assert found == pytest.approx([unigram(token) for token in range(VOCABULARY)])
    assert found.sum() == pytest.approx(1)


def test_bigrams_back_off_and_sum_to_one(ngrams: Ngrams) -> None:
    every = np.arange(VOCABULARY)
    for context in range(VOCABULARY):
        found = bigram_probabilities(ngrams, BOS, np.full(VOCABULARY, context), every)
        assert found == pytest.approx([bigram(context, token) for token in every.tolist()])
        assert found.sum() == pytest.approx(1)


def test_scores_count_what_a_model_predicts(ngrams: Ngrams) -> None:
    scores = ngram_scores(ngrams, BOS, TEXTS, text_bytes=11)
    pairs = predictions(TEXTS)
    assert scores["unigram"].nats == pytest.approx(-sum(math.log(unigram(t)) for _, t in pairs))
    assert scores["bigram"].nats == pytest.approx(-sum(math.log(bigram(c, t)) for c, t in pairs))
    assert scores["bigram"].predicted_tokens == len(pairs) == 8
    assert scores["bigram"].bits_per_byte == pytest.approx(scores["bigram"].nats / math.log(2) / 11)


def test_files_that_are_missing_or_damaged_say_so(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="the counts of the baselines"):
        Ngrams.load(tmp_path / "absent.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    with pytest.raises(CorruptFileError, match="cannot be read"):
        Ngrams.load(tmp_path / "bad.safetensors")
    save_file({"unigrams": np.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(CorruptFileError, match="bigram_offsets"):
        Ngrams.load(tmp_path / "other.safetensors")
