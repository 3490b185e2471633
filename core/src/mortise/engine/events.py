"""What leaves the engine: a token at a time while it runs, and the whole when it is done."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mortise.engine.logprobs import TokenLogprobs
    from mortise.engine.request import Finish, FinishReason, Request
    from mortise.engine.speculative.statistics import DraftStatistics


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One new token of one request.

    Args:
        request_id: whose it is.
        index: place of its prompt in the call.
        token_id: the token.
        text: text that became certain with it; empty while a character or a stop text may still be
            completed, and where there is no tokenizer.
        logprobs: if they were asked for.
        finish: set on the last token of the request.
    """

    request_id: int
    index: int
    token_id: int
    text: str
    logprobs: TokenLogprobs | None = None
    finish: Finish | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Wall time of one request, in seconds from when it was added.

    Args:
        first_token: until its first token.
        total: until its last.
        prompt_tokens: tokens read.
        generated_tokens: tokens generated.
    """

    first_token: float
    total: float
    prompt_tokens: int
    generated_tokens: int

    @classmethod
    def of(cls, request: Request) -> Timings:
        """Of a finished request."""
        assert request.first_token_at is not None
        assert request.finished_at is not None
        return cls(
            first_token=request.first_token_at - request.added_at,
            total=request.finished_at - request.added_at,
            prompt_tokens=request.num_prompt_tokens,
            generated_tokens=request.num_generated,
        )

    @property
    def tokens_per_second(self) -> float | None:
        """Of the tokens after the first; None if there was only one."""
        seconds = self.total - self.first_token
        return (self.generated_tokens - 1) / seconds if seconds > 0 else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What became of one prompt.

    Args:
        index: place of the prompt in the call.
        prompt: the text, or None if token ids were given.
        prompt_token_ids: its tokens as they were read, special ones included; without the last one
            if that was healed.
        healed_token_id: the last token of the prompt, if the first generated one stands in its
            place and begins with its text; else None.
        text: what continues the prompt's text, without the stop text; None without a tokenizer.
        token_ids: every generated token, the one that ended it included.
        finish_reason: ``stop`` or ``length``.
        stopped_by: the token or text that ended it, if one did.
        seed: of its random numbers; the same seed gives the same tokens.
        logprobs: one entry a token, if they were asked for.
        timings: wall time.
        drafting: how many tokens were drafted and accepted; None where nothing drafts.
    """

    index: int
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    healed_token_id: int | None
    text: str | None
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stopped_by: int | str | None
    seed: int
    logprobs: tuple[TokenLogprobs, ...] | None
    timings: Timings
    drafting: DraftStatistics | None = None
