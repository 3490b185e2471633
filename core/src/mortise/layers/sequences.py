"""Where the tokens of several sequences sit in one pass, for layers that read them in order."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Final

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

# Shape suffixes: B sequences, T tokens of all, A sequences that still have tokens, C tokens of a
# chunk, W width of a window, S tokens of each sequence where all have as many.

CHUNK_SIZE: Final = 64
"""Tokens of a sequence that are taken at a time (that of ``chunk_gated_delta_rule``, FLA)."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """The next tokens of every sequence that still has some, at most 64 of each.

    Args:
        sequences: int64 ``[A]``, which sequences.
        reads: int64 ``[A, C]``, row of each token; past the end of a sequence, of its last token.
        writes: int64 ``[A, C]``, the same, but T past the end.
        present: bool ``[A, C]``, whether there is a token.
    """

    sequences: torch.Tensor
    reads: torch.Tensor
    writes: torch.Tensor
    present: torch.Tensor


class Sequences:
    """The rows of B sequences that stand one after another, however long each of them is.

    Args:
        lens: new tokens of each sequence; 0 is none.
        width: tokens that a causal convolution sees.
        device: where the rows are.
    """

    def __init__(self, lens: Sequence[int], width: int, device: torch.device) -> None:
        self.num_sequences = len(lens)
        self.num_tokens = sum(lens)
        self.width = width
        self.window_TW, self.newest_BR = (
            places.to(device) for places in _windows(tuple(lens), width)
        )
        self.chunks = tuple(_chunks(tuple(lens), device))


class Steps:
    """The rows of B sequences of S tokens each, read one token of every sequence at a time.

    Args:
        num_sequences: B.
        num_steps: S.
        width: tokens that a causal convolution sees.
        device: where the rows are.

    Attributes:
        single: one token of every sequence.
        rows_SB: int64 ``[S, B]``, row of each token.
    """

    def __init__(
        self, num_sequences: int, num_steps: int, width: int, device: torch.device
    ) -> None:
        self.num_steps = num_steps
        self.single = Sequences((1,) * num_sequences, width, device)
        rows_T = torch.arange(num_sequences * num_steps, device=device)
        self.rows_SB = rows_T.view(num_sequences, num_steps).t().contiguous()


def _windows(lens: tuple[int, ...], width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows ``[T, W]`` that each token sees, and the newest ``[B, W - 1]`` of each sequence.

    Both count in the ``W - 1`` rows kept of every sequence, followed by the T new rows.
    """
    kept = width - 1
    lens_B = torch.tensor(lens, dtype=torch.int64)
    sequence_T = torch.arange(len(lens)).repeat_interleave(lens_B)
    starts_B = lens_B.cumsum(0) - lens_B
    offset_T = torch.arange(sum(lens)) - starts_B[sequence_T]

    def rows(offsets: torch.Tensor, sequence: torch.Tensor) -> torch.Tensor:
        new = len(lens) * kept + starts_B[sequence] + offsets
        return torch.where(offsets >= 0, new, sequence * kept + kept + offsets)

    window_TW = rows(offset_T.unsqueeze(1) + torch.arange(-kept, 1), sequence_T.unsqueeze(1))
    every_B1 = torch.arange(len(lens)).unsqueeze(1)
    return window_TW, rows(lens_B.unsqueeze(1) + torch.arange(-kept, 0), every_B1)


def _chunks(lens: tuple[int, ...], device: torch.device) -> Iterator[Chunk]:
    starts = (0, *accumulate(lens))
    for first in range(0, max(lens, default=0), CHUNK_SIZE):
        active = [number for number, length in enumerate(lens) if length > first]
        left_A1 = torch.tensor([[lens[number] - first] for number in active])
        begin_A1 = torch.tensor([[starts[number] + first] for number in active])
        offset_C = torch.arange(min(CHUNK_SIZE, int(left_A1.max())))
        present_AC = offset_C < left_A1
        reads_AC = begin_A1 + torch.minimum(offset_C, left_A1 - 1)
        yield Chunk(
            sequences=torch.tensor(active, device=device),
            reads=reads_AC.to(device),
            writes=torch.where(present_AC, reads_AC, sum(lens)).to(device),
            present=present_AC.to(device),
        )
