"""Text while it is being generated, without ever showing half a character."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

# What decoders put in the place of bytes that are no character, or not yet one.
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class StreamDecoder:
    """Turns ids into text one at a time.

    For a byte-level vocabulary the pieces and the flushed rest, put together, equal decoding all
    ids at once. Text that ends in U+FFFD is held back until the next id completes it or shows that
    it is final.

    Args:
        decode: text of a sequence of ids.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        # Ids since the last but one place where the text was complete. Those before the last such
        # place are only context: some decoders treat the first id of a text in a special way.
        self._ids: list[int] = []
        self._num_context = 0
        self._shown = ""

    def push(self, token_id: int) -> str:
        """Take one more id and return the text that is certain by now and was not returned yet."""
        self._ids.append(token_id)
        text = self._unseen()
        certain = text.rstrip(REPLACEMENT)
        if certain and certain == text:
            self._ids = self._ids[self._num_context :]
            self._num_context = len(self._ids)
            self._shown = self._decode(self._ids)
        else:
            self._shown += certain
        return certain

    def flush(self) -> str:
        """The rest at the end of the text; incomplete characters become U+FFFD."""
        rest = self._unseen()
        self._ids, self._num_context, self._shown = [], 0, ""
        return rest

    def _unseen(self) -> str:
        """Text of the pending ids that was not returned yet, with U+FFFD for what is incomplete."""
        text = self._decode(self._ids)
        if text.startswith(self._shown):
            return text.removeprefix(self._shown)
        # A vocabulary that falls back to bytes decodes a whole run of bytes or none of it, so one
        # more byte can turn text that was complete into U+FFFD. What was returned stays.
        return self._decode(self._ids[self._num_context :])
