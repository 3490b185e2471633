"""Counts unigrams and bigrams of the training tokens, the baselines the small model has to beat.

    python -m training.baselines DATA OUTPUT

Shape suffixes: V vocabulary, N tokens in a stream, P distinct pairs of tokens.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import click
import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file

from training.data import TokenIds, load_tokens
from training.tokenizer import BOS_ID, VOCAB_SIZE

COUNT_LIMIT: Final = np.iinfo(np.uint16).max
UNIGRAM_ADDED_COUNT: Final = 1.0


@dataclass(frozen=True, slots=True)
class Ngrams:
    """Counts of tokens and of pairs of neighbours, the pairs in compressed sparse rows.

    `unigrams_V` int32; the followers of token v are `columns_P[offsets[v]:offsets[v + 1]]`
    (uint16, ascending) with `counts_P` (uint16, at most 65535). A beginning-of-sentence token
    counts as a context but is never predicted.
    """

    unigrams_V: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int32]
    columns_P: npt.NDArray[np.uint16]
    counts_P: npt.NDArray[np.uint16]

    def save(self, file: Path) -> None:
        """Write the counts to a safetensors file."""
        tensors: dict[str, npt.NDArray[Any]] = {
            "unigrams": self.unigrams_V,
            "bigram_offsets": self.offsets,
            "bigram_columns": self.columns_P,
            "bigram_counts": self.counts_P,
        }
        save_file(tensors, file)

    @classmethod
    def load(cls, file: Path) -> Ngrams:
        """Read counts that `save` wrote."""
        tensors = load_file(file)
        return cls(
            tensors["unigrams"],
            tensors["bigram_offsets"],
            tensors["bigram_columns"],
            tensors["bigram_counts"],
        )


def pairs(tokens_N: TokenIds) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return contexts and targets of every prediction in the stream: not of a bos token."""
    contexts, targets = tokens_N[:-1].astype(np.int64), tokens_N[1:].astype(np.int64)
    predicted = targets != BOS_ID
    return contexts[predicted], targets[predicted]


def count(tokens_N: TokenIds, vocab_size: int = VOCAB_SIZE) -> Ngrams:
    """Count the tokens and the pairs of neighbours of a stream `bos text eos bos text eos ...`."""
    contexts, targets = pairs(tokens_N)
    keys, counts = np.unique(contexts * vocab_size + targets, return_counts=True)
    offsets = np.searchsorted(keys, np.arange(vocab_size + 1) * vocab_size)
    return Ngrams(
        unigrams_V=np.bincount(targets, minlength=vocab_size).astype(np.int32),
        offsets=offsets.astype(np.int32),
        columns_P=(keys % vocab_size).astype(np.uint16),
        counts_P=np.minimum(counts, COUNT_LIMIT).astype(np.uint16),
    )


def unigram_probabilities(ngrams: Ngrams) -> npt.NDArray[np.float64]:
    """Return the add-one unigram distribution [V]; the bos token has no part in it."""
    smoothed = ngrams.unigrams_V + UNIGRAM_ADDED_COUNT
    smoothed[BOS_ID] = 0.0
    return np.asarray(smoothed / smoothed.sum())


def bigram_probabilities(
    ngrams: Ngrams, contexts_N: npt.NDArray[np.int64], targets_N: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    """Return the probability [N] of each target after its context, smoothed by Witten and Bell.

    p(w | v) = (c(v, w) + T(v) p(w)) / (c(v) + T(v)) with T(v) the number of distinct followers of
    v, after Witten & Bell 1991 (IEEE Trans. Inf. Theory 37(4)); an unseen v gives the unigram p(w).
    """
    vocab_size = len(ngrams.unigrams_V)
    followers_V = np.diff(ngrams.offsets)
    rows_P = np.repeat(np.arange(vocab_size, dtype=np.int64), followers_V)
    totals_V = np.bincount(rows_P, weights=ngrams.counts_P, minlength=vocab_size)
    keys_P = rows_P * vocab_size + ngrams.columns_P
    wanted_N = contexts_N * vocab_size + targets_N
    places_N = np.minimum(np.searchsorted(keys_P, wanted_N), len(keys_P) - 1)
    counts_N = np.where(keys_P[places_N] == wanted_N, ngrams.counts_P[places_N], 0)
    unigram_N = unigram_probabilities(ngrams)[targets_N]
    backoff_N = np.maximum(followers_V[contexts_N], totals_V[contexts_N] == 0)
    return np.asarray((counts_N + backoff_N * unigram_N) / (totals_V[contexts_N] + backoff_N))


@dataclass(frozen=True, slots=True)
class Score:
    """Mean negative log-likelihood in nats a token, and what follows from it."""

    predicted_tokens: int
    nats_per_token: float
    perplexity: float
    bits_per_byte: float


def score(log_probabilities_N: npt.NDArray[np.float64], text_bytes: int) -> Score:
    """Return the score of natural log-probabilities of all tokens of a text of `text_bytes`."""
    nats = -float(log_probabilities_N.sum())
    mean = nats / len(log_probabilities_N)
    return Score(
        predicted_tokens=len(log_probabilities_N),
        nats_per_token=mean,
        perplexity=float(np.exp(mean)),
        bits_per_byte=float(nats / np.log(2) / text_bytes),
    )


def unigram_score(ngrams: Ngrams, tokens_N: TokenIds, text_bytes: int) -> Score:
    """Return the score of the add-one unigram model on a stream."""
    _, targets_N = pairs(tokens_N)
    return score(np.log(unigram_probabilities(ngrams)[targets_N]), text_bytes)


def bigram_score(ngrams: Ngrams, tokens_N: TokenIds, text_bytes: int) -> Score:
    """Return the score of the interpolated bigram model on a stream."""
    return score(np.log(bigram_probabilities(ngrams, *pairs(tokens_N))), text_bytes)


@click.command()
@click.argument("data", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("output", type=click.Path(file_okay=False, path_type=Path))
def main(data: Path, output: Path) -> None:
    """Count DATA/train.bin into OUTPUT/ngrams.safetensors and score DATA/held_out.bin."""
    ngrams = count(load_tokens(data / "train.bin"))
    output.mkdir(parents=True, exist_ok=True)
    ngrams.save(output / "ngrams.safetensors")
    held_out = load_tokens(data / "held_out.bin")
    text_bytes = json.loads((data / "data.json").read_text())["held_out"]["text_bytes"]
    for name, scored in (
        ("unigram", unigram_score(ngrams, held_out, text_bytes)),
        ("bigram", bigram_score(ngrams, held_out, text_bytes)),
    ):
        click.echo(f"{name}: {scored}")


if __name__ == "__main__":
    main()
