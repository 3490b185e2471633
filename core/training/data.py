"""Packs documents into a file of token ids, and draws seeded batches of windows from it.

    python -m training.data CORPUS TOKENIZER OUTPUT

A batch is a function of seed and step alone, so a run resumes by its step number.
Shape suffixes: B batch, S sequence length, N tokens in the stream.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import click
import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer

from training.corpus import read_jsonl
from training.tokenizer import BOS_ID, EOS_ID

if TYPE_CHECKING:
    from collections.abc import Iterable

TokenIds = npt.NDArray[np.uint16]


@dataclass(frozen=True, slots=True)
class Packed:
    """A token stream: uint16 `tokens_N`, and the number of UTF-8 bytes of text behind it."""

    tokens_N: TokenIds
    text_bytes: int
    documents: int


def pack(documents: Iterable[tuple[str, str]], tokenizer: Tokenizer) -> Packed:
    """Encode (path, text) pairs as `bos text eos`, one after another."""
    pieces: list[TokenIds] = []
    text_bytes = 0
    for _, text in documents:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        pieces.append(np.array([BOS_ID, *ids, EOS_ID], dtype=np.uint16))
        text_bytes += len(text.encode())
    return Packed(np.concatenate(pieces), text_bytes, len(pieces))


@lru_cache(maxsize=2)
def _epoch_starts(
    num_tokens: int, sequence_length: int, seed: int, epoch: int
) -> npt.NDArray[np.int64]:
    """Return the shuffled starts of one epoch's windows, which cover the stream without overlap."""
    generator = np.random.default_rng([seed, epoch])
    num_windows = (num_tokens - 2) // sequence_length - 1
    phase = int(generator.integers(sequence_length))
    starts: npt.NDArray[np.int64] = generator.permutation(num_windows) * sequence_length + phase
    return starts


@dataclass(frozen=True, slots=True)
class Batches:
    """Windows of `sequence_length` + 2 tokens: inputs, next tokens and the tokens after those.

    Every epoch visits each window once, in a new order and shifted by a new offset.

    Raises:
        ValueError: the stream is shorter than two windows.
    """

    tokens_N: TokenIds
    sequence_length: int
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        if len(self.tokens_N) < 2 * self.sequence_length + 2:
            raise ValueError(
                f"{len(self.tokens_N)} tokens are too few for windows of {self.sequence_length}"
            )

    def start(self, index: int) -> int:
        """Return where window number `index`, counted from the first step, begins."""
        num_windows = (len(self.tokens_N) - 2) // self.sequence_length - 1
        epoch, position = divmod(index, num_windows)
        starts = _epoch_starts(len(self.tokens_N), self.sequence_length, self.seed, epoch)
        return int(starts[position])

    def batch(self, step: int) -> torch.Tensor:
        """Return the int64 windows [B, S + 2] of step number `step`."""
        first = step * self.batch_size
        windows = []
        for index in range(first, first + self.batch_size):
            start = self.start(index)
            windows.append(self.tokens_N[start : start + self.sequence_length + 2])
        return torch.from_numpy(np.stack(windows).astype(np.int64))


def load_tokens(file: Path) -> TokenIds:
    """Map a file of uint16 token ids into memory."""
    return np.memmap(file, dtype=np.uint16, mode="r")


@click.command()
@click.argument("corpus", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("tokenizer", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("output", type=click.Path(file_okay=False, path_type=Path))
def main(corpus: Path, tokenizer: Path, output: Path) -> None:
    """Encode CORPUS/{train,held_out}.jsonl into OUTPUT/{train,held_out}.bin and data.json."""
    encoder = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    output.mkdir(parents=True, exist_ok=True)
    facts = {}
    for part in ("train", "held_out"):
        packed = pack(read_jsonl(corpus / f"{part}.jsonl"), encoder)
        packed.tokens_N.tofile(output / f"{part}.bin")
        facts[part] = {
            "tokens": len(packed.tokens_N),
            "documents": packed.documents,
            "text_bytes": packed.text_bytes,
        }
    text = json.dumps(facts, indent=2)
    (output / "data.json").write_text(text + "\n", encoding="utf-8")
    click.echo(text)


if __name__ == "__main__":
    main()
