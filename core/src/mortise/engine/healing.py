"""Token healing: the last token of a prompt is chosen again, since its text may go on within it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from mortise.checkpoint import Tokenizer


@dataclass(frozen=True, slots=True)
class Healing:
    """What a request generates in the place of its prompt's last token.

    Args:
        token_id: the token that was cut off.
        allowed: tokens that begin with its bytes, itself among them; the first one that is
            generated is one of these.
    """

    token_id: int
    allowed: tuple[int, ...]


def healing_of(
    token_ids: Sequence[int], tokenizer: Tokenizer, stop_token_ids: Collection[int]
) -> Healing | None:
    """How the prompt is healed; None where that would change nothing or is impossible.

    A text is cut into the longest tokens, so a model that learned from texts with ``):`` and a
    line break as one token has hardly seen the token ``):`` before a line break. A prompt that ends
    there tells it that no line break follows. As in transformers, one token is cut back, and only
    longer tokens with the same beginning, or the same token, may come instead.

    Nothing is done if no other token begins like the last one, if the last one is special, if it
    would end the completion, or if nothing stands before it, not even a token that begins a text.

    Source: ``GenerationMixin.heal_tokens`` of transformers, after "token healing" of guidance.

    Args:
        token_ids: the prompt's, at least one.
        tokenizer: whose tokens they are.
        stop_token_ids: tokens that end the request.
    """
    *before, last = token_ids
    if not before or last in stop_token_ids:
        return None
    allowed = tokenizer.extensions(last)
    return Healing(last, allowed) if len(allowed) > 1 else None
