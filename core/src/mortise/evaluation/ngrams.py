"""Baselines that count: unigrams, and bigrams that back off to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from mortise.errors import CorruptFileError, ModelNotFoundError
from mortise.evaluation.score import Score

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import numpy.typing as npt

    Integers = npt.NDArray[np.int64]

# Shape suffixes: V vocabulary, N predicted tokens, P distinct pairs of neighbours.


@dataclass(frozen=True, slots=True, eq=False)
class Ngrams:
    """Counts of tokens and of pairs of neighbours in the built-in model's training text.

    ``unigrams_V`` counts each token where it was predicted; the followers of token v are
    ``columns_P[offsets[v]:offsets[v + 1]]``, ascending, and were seen ``counts_P`` times.
    """

    unigrams_V: Integers
    offsets: Integers
    columns_P: Integers
    counts_P: Integers

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read the counts that the training wrote.

        Raises:
            ModelNotFoundError: the installation lacks the file.
            CorruptFileError: it is not a safetensors file with these counts.
        """
        if not path.is_file():
            raise ModelNotFoundError(
                "the counts of the baselines are not part of this installation",
                details=[f"looked for: {path}"],
                remedy="install mortise-core again",
            )
        try:
            tensors = load_file(path)
            names = ("unigrams", "bigram_offsets", "bigram_columns", "bigram_counts")
            return cls(*(tensors[name].astype(np.int64) for name in names))
        except (SafetensorError, KeyError) as error:
            raise CorruptFileError(
                f"the counts of the baselines in {path} cannot be read: {error}",
                remedy="install mortise-core again",
            ) from error

    @property
    def vocab_size(self) -> int:
        """Tokens that were counted."""
        return len(self.unigrams_V)


def unigram_probabilities(ngrams: Ngrams, bos_token_id: int) -> npt.NDArray[np.float64]:
    """Of every token, ``[V]``, with one added to each count; the first token is never predicted."""
    smoothed_V = ngrams.unigrams_V + 1.0
    smoothed_V[bos_token_id] = 0.0
    return np.asarray(smoothed_V / smoothed_V.sum())


def bigram_probabilities(
    ngrams: Ngrams, bos_token_id: int, contexts_N: Integers, targets_N: Integers
) -> npt.NDArray[np.float64]:
    """Of each target after its context, ``[N]``, smoothed by Witten and Bell.

    p(w | v) = (c(v, w) + T(v) p(w)) / (c(v) + T(v)), where T(v) distinct tokens followed v (Witten
    & Bell 1991, IEEE Transactions on Information Theory 37(4)); p(w) where nothing ever did.
    """
    vocab_size = ngrams.vocab_size
    followers_V = np.diff(ngrams.offsets)
    contexts_P = np.repeat(np.arange(vocab_size), followers_V)
    totals_V = np.bincount(contexts_P, weights=ngrams.counts_P, minlength=vocab_size)
    keys_P = contexts_P * vocab_size + ngrams.columns_P
    wanted_N = contexts_N * vocab_size + targets_N
    places_N = np.minimum(np.searchsorted(keys_P, wanted_N), max(len(keys_P) - 1, 0))
    counts_N = np.where(keys_P[places_N] == wanted_N, ngrams.counts_P[places_N], 0)
    unigram_N = unigram_probabilities(ngrams, bos_token_id)[targets_N]
    backoff_N = np.maximum(followers_V[contexts_N], totals_V[contexts_N] == 0)
    return np.asarray((counts_N + backoff_N * unigram_N) / (totals_V[contexts_N] + backoff_N))


def ngram_scores(
    ngrams: Ngrams, bos_token_id: int, token_ids: Sequence[Sequence[int]], text_bytes: int
) -> dict[str, Score]:
    """Of every token but the first of each text, as for a model: ``unigram`` and ``bigram``."""
    contexts_N = np.array([token for ids in token_ids for token in ids[:-1]], dtype=np.int64)
    targets_N = np.array([token for ids in token_ids for token in ids[1:]], dtype=np.int64)
    probabilities = {
        "unigram": unigram_probabilities(ngrams, bos_token_id)[targets_N],
        "bigram": bigram_probabilities(ngrams, bos_token_id, contexts_N, targets_N),
    }
    return {
        name: Score(-float(np.log(found_N).sum()), len(targets_N), text_bytes)
        for name, found_N in probabilities.items()
    }
