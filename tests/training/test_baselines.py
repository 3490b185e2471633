import itertools
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from training.baselines import count, save, scores

from mortise.evaluation.ngrams import Ngrams

VOCAB_SIZE = 12


def stream(seed: int, documents: int) -> np.ndarray:
    """Documents of random tokens 2..9 between bos 0 and eos 1; 10 and 11 are never seen."""
    generator = np.random.default_rng(seed)
    parts = []
    for _ in range(documents):
        text = generator.integers(2, 10, size=generator.integers(1, 9))
        parts.append(np.concatenate([[0], text, [1]]))
    return np.concatenate(parts).astype(np.uint16)


def naive_bigram_nats(train: list[int], test: list[int]) -> float:
    predicted = [token for token in train[1:] if token != 0]
    unigrams = Counter(predicted)
    followers: dict[int, Counter[int]] = {}
    for context, target in itertools.pairwise(train):
        if target != 0:
            followers.setdefault(context, Counter())[target] += 1
    nats = []
    for context, target in itertools.pairwise(test):
        if target == 0:
            continue
        unigram = (unigrams[target] + 1) / (len(predicted) + VOCAB_SIZE - 1)
        seen = followers.get(context, Counter())
        if seen:
            probability = (seen[target] + len(seen) * unigram) / (seen.total() + len(seen))
        else:
            probability = unigram
        nats.append(-math.log(probability))
    return sum(nats) / len(nats)


def test_the_bigram_score_agrees_with_a_naive_computation() -> None:
    train = stream(1, documents=6)
    test = np.concatenate([stream(2, documents=5), [0, 10, 11, 3, 1]]).astype(np.uint16)
    score = scores(count(train, VOCAB_SIZE), test, text_bytes=100)["bigram"]
    assert score.nats_per_token == pytest.approx(naive_bigram_nats(train.tolist(), test.tolist()))
    assert score.perplexity == pytest.approx(math.exp(score.nats_per_token))
    nats = score.nats_per_token * score.predicted_tokens
    assert score.bits_per_byte == pytest.approx(nats / math.log(2) / 100)


def test_the_unigram_score_agrees_with_a_naive_computation() -> None:
    train, test = stream(1, documents=6), stream(2, documents=5)
    predicted = [token for token in train.tolist() if token != 0]
    unigrams = Counter(predicted)
    nats = [
        -math.log((unigrams[token] + 1) / (len(predicted) + VOCAB_SIZE - 1))
        for token in test.tolist()
        if token != 0
    ]
    score = scores(count(train, VOCAB_SIZE), test, text_bytes=100)["unigram"]
    assert score.predicted_tokens == len(nats)
    assert score.nats_per_token == pytest.approx(sum(nats) / len(nats))


def test_counts_survive_the_file(tmp_path: Path) -> None:
    ngrams = count(stream(1, documents=6), VOCAB_SIZE)
    save(ngrams, tmp_path / "ngrams.safetensors")
    loaded = Ngrams.load(tmp_path / "ngrams.safetensors")
    test = stream(2, documents=5)
    assert scores(loaded, test, 1) == scores(ngrams, test, 1)
