"""Counts unigrams and bigrams of the training tokens, the baselines the small model has to beat.

    python -m training.baselines DATA OUTPUT

Shape suffixes: V vocabulary, N tokens in a stream, P distinct pairs of tokens.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click
import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from mortise.evaluation.ngrams import Ngrams, ngram_scores
from training.data import TokenIds, load_tokens
from training.tokenizer import BOS_ID, VOCAB_SIZE

if TYPE_CHECKING:
    from mortise.evaluation.score import Score

COUNT_LIMIT: Final = np.iinfo(np.uint16).max


def save(ngrams: Ngrams, file: Path) -> None:
    """Write counts as `mortise.evaluation` reads them, in the narrowest integers."""
    tensors: dict[str, npt.NDArray[Any]] = {
        "unigrams": ngrams.unigrams_V.astype(np.int32),
        "bigram_offsets": ngrams.offsets.astype(np.int32),
        "bigram_columns": ngrams.columns_P.astype(np.uint16),
        "bigram_counts": ngrams.counts_P.astype(np.uint16),
    }
    save_file(tensors, file)


def documents(tokens_N: TokenIds) -> list[TokenIds]:
    """Split a stream into its documents, each `bos text eos`."""
    starts = np.flatnonzero(tokens_N == BOS_ID)
    return np.split(tokens_N, starts[1:])


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
        unigrams_V=np.bincount(targets, minlength=vocab_size),
        offsets=offsets,
        columns_P=keys % vocab_size,
        counts_P=np.minimum(counts, COUNT_LIMIT),
    )


def scores(ngrams: Ngrams, tokens_N: TokenIds, text_bytes: int) -> dict[str, Score]:
    """Return the scores of both baselines on a stream: `unigram` and `bigram`."""
    texts = [document.tolist() for document in documents(tokens_N)]
    return ngram_scores(ngrams, BOS_ID, texts, text_bytes)


@click.command()
@click.argument("data", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("output", type=click.Path(file_okay=False, path_type=Path))
def main(data: Path, output: Path) -> None:
    """Count DATA/train.bin into OUTPUT/ngrams.safetensors and score DATA/held_out.bin."""
    ngrams = count(load_tokens(data / "train.bin"))
    output.mkdir(parents=True, exist_ok=True)
    save(ngrams, output / "ngrams.safetensors")
    held_out = load_tokens(data / "held_out.bin")
    text_bytes = json.loads((data / "data.json").read_text())["held_out"]["text_bytes"]
    for name, scored in scores(ngrams, held_out, text_bytes).items():
        click.echo(f"{name}: perplexity {scored.perplexity:.2f}")


if __name__ == "__main__":
    main()
