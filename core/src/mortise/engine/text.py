"""The text of one request while it grows, cut before the first stop text."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mortise.checkpoint import StreamDecoder

NUM_CONTEXT_TOKENS = 8
"""Tokens of the prompt that the decoder sees first: some vocabularies write a text's first token
differently, and a completion does not begin a text."""


class TextStream:
    """Gives out only text that no later token can take back.

    Text that may be the beginning of a stop text waits until it is known not to be one.

    Args:
        decoder: of this request alone.
        prompt_token_ids: what the completion goes on from.
        stops: texts that end the completion.
    """

    def __init__(
        self, decoder: StreamDecoder, prompt_token_ids: Sequence[int], stops: Sequence[str]
    ) -> None:
        self._decoder = decoder
        self._stops = tuple(stops)
        self._pending = ""
        self._num_unwanted = 0
        self.stopped_by: str | None = None
        for token_id in prompt_token_ids[-NUM_CONTEXT_TOKENS:]:
            decoder.push(token_id)

    def leave_out(self, num_characters: int) -> None:
        """Give out nothing of the first characters to come, which stand in the prompt already."""
        self._num_unwanted = num_characters

    def push(self, token_id: int) -> str:
        """Take one token and return the text that became certain; sets ``stopped_by``."""
        return self._take(self._wanted(self._decoder.push(token_id)))

    def flush(self) -> str:
        """The rest, when no token follows: what was held back, and U+FFFD for half a character."""
        rest = self._pending + self._wanted(self._decoder.flush())
        self._pending = ""
        return rest if self.stopped_by is None else ""

    def _wanted(self, piece: str) -> str:
        wanted = piece[self._num_unwanted :]
        self._num_unwanted -= len(piece) - len(wanted)
        return wanted

    def _take(self, piece: str) -> str:
        if not self._stops:
            return piece
        pending = self._pending + piece
        found = [(pending.find(stop), stop) for stop in self._stops if stop in pending]
        if found:
            end, self.stopped_by = min(found)
            self._pending = ""
            return pending[:end]
        kept = max(_overlap(pending, stop) for stop in self._stops)
        self._pending = pending[len(pending) - kept :]
        return pending[: len(pending) - kept]


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of ``text`` with which ``stop``, longer than that, begins."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
