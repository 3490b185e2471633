"""The pieces of text in a vocabulary, in an order that finds those that begin alike."""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

BYTE_FALLBACK: Final = re.compile(r"<0x[0-9A-F]{2}>")
"""How vocabularies of characters name the tokens that stand for one byte."""


class Pieces:
    """Every token that stands for a piece of text, sorted by its piece.

    Pieces are compared as the vocabulary writes them. A byte-level vocabulary writes each byte as
    one character of its own, so that there a piece begins with another if its bytes do, even
    within a character of the text.

    Left out are added tokens, special ones among them, which never come of merging, and the single
    bytes of a vocabulary of characters, which are named there and not written.

    Args:
        backend: the vocabulary.
    """

    def __init__(self, backend: Backend) -> None:
        added = backend.get_added_tokens_decoder()
        self._piece_of = {
            token_id: piece
            for piece, token_id in backend.get_vocab(with_added_tokens=False).items()
            if piece and token_id not in added and not BYTE_FALLBACK.fullmatch(piece)
        }
        self._ids = sorted(self._piece_of, key=self._piece_of.__getitem__)
        self._sorted = [self._piece_of[token_id] for token_id in self._ids]

    def extensions(self, token_id: int) -> tuple[int, ...]:
        """Tokens whose piece begins with that of ``token_id``, itself the first of them.

        Empty if ``token_id`` stands for no piece.
        """
        piece = self._piece_of.get(token_id)
        if piece is None:
            return ()
        first = bisect_left(self._sorted, piece)
        end = bisect_right(self._sorted, piece, first, key=lambda other: other[: len(piece)])
        return tuple(self._ids[first:end])
