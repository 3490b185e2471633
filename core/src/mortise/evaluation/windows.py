"""A long text cut into windows that a model's context can hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


@dataclass(frozen=True, slots=True)
class Window:
    """Tokens ``start`` up to ``end`` are read; of what they predict, the last ``num_new`` count.

    Token i predicts token i + 1, so ``end`` is the last token that is predicted.
    """

    start: int
    end: int
    num_new: int


def windows(num_tokens: int, length: int, stride: int) -> Iterator[Window]:
    """Predict every token but the first exactly once.

    Each window begins ``stride`` tokens after the one before, so that beyond the first window a
    token is predicted from at least ``length - stride`` tokens before it.

    Args:
        num_tokens: tokens of the text.
        length: tokens read in a window at most, at least 1.
        stride: from 1 to ``length``.
    """
    assert 1 <= stride <= length
    predicted = 0
    for start in range(0, num_tokens, stride):
        end = min(start + length, num_tokens - 1)
        if end <= predicted:
            return
        yield Window(start, end, end - predicted)
        predicted = end


def predictions(
    token_ids: Sequence[Sequence[int]], length: int, stride: int
) -> Iterator[tuple[Sequence[int], Sequence[int]]]:
    """Of every window of every text the tokens that are read, and those that count as predicted.

    The last logits of what is read, as many as there are predicted tokens, predict them.
    """
    for ids in token_ids:
        for window in windows(len(ids), length, stride):
            wanted = slice(window.end - window.num_new + 1, window.end + 1)
            yield ids[window.start : window.end], ids[wanted]


def num_predictions(token_ids: Sequence[Sequence[int]]) -> int:
    """Every token of every text but the first."""
    return sum(max(len(ids) - 1, 0) for ids in token_ids)
