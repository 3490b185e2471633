"""How many tokens a request may generate, and how many requests have a state at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from mortise.errors import CapacityError, PromptTooLongError, RequestError
from mortise.kv.pages import PAGE_SIZE

if TYPE_CHECKING:
    from mortise.config import SchedulerConfig

DEFAULT_MAX_TOKENS: Final = 128


def state_slots(scheduler: SchedulerConfig) -> int:
    """Requests whose state recurrent layers keep: all that run, and one sequence that is scored."""
    return scheduler.max_num_seqs + 1


def check_prompt(token_ids: list[int], vocab_size: int) -> None:
    """Refuse a prompt that is empty or holds what is no token of the model.

    Raises:
        RequestError: says which.
    """
    if not token_ids:
        raise RequestError(
            "the prompt is empty",
            expected="at least one token",
            remedy="give a prompt; this model's tokenizer adds no token of its own",
        )
    for place, token_id in enumerate(token_ids):
        if not 0 <= token_id < vocab_size:
            raise RequestError(
                f"token {place} of the prompt is {token_id!r}",
                expected=f"an integer from 0 to {vocab_size - 1}",
                remedy="encode the prompt with the tokenizer of this model",
            )


def new_token_limit(
    *, num_prompt_tokens: int, max_tokens: int | None, context: int, num_pages: int
) -> int:
    """Tokens a request may generate, at least one.

    Prompt and new tokens together fit into the context. The last new token is never read back, so
    the cache needs one place less.

    Args:
        num_prompt_tokens: tokens of the prompt.
        max_tokens: as asked; None asks for 128 or what fits, whichever is less.
        context: positions the model knows.
        num_pages: pages of the whole cache.

    Raises:
        PromptTooLongError: the prompt, or the prompt with ``max_tokens``, exceeds the context.
        CapacityError: it exceeds the cache, even if it runs alone.
    """
    if num_prompt_tokens >= context:
        raise PromptTooLongError(
            f"the prompt has {num_prompt_tokens} tokens",
            expected=f"at most {context - 1}, since the model's context is {context} tokens and at"
            " least one is generated",
            remedy="shorten the prompt, or use a model with a longer context",
        )
    if max_tokens is not None and num_prompt_tokens + max_tokens > context:
        raise PromptTooLongError(
            f"the prompt has {num_prompt_tokens} tokens and max_tokens is {max_tokens}, which makes"
            f" {num_prompt_tokens + max_tokens}",
            expected=f"at most {context} together, the model's context",
            remedy=f"shorten the prompt, or ask for at most {context - num_prompt_tokens} tokens",
        )
    places = num_pages * PAGE_SIZE
    needed = num_prompt_tokens + (max_tokens or 1) - 1
    if needed > places:
        raise CapacityError(
            f"the request needs {needed} places in the cache ({num_prompt_tokens} tokens of the"
            f" prompt and {max_tokens or 1} new ones, of which the last needs none)",
            expected=f"at most {places}: {num_pages} pages of {PAGE_SIZE} tokens",
            remedy="raise cache.max_num_tokens (or cache.num_pages) in the engine configuration,"
            " or ask for less",
        )
    if max_tokens is not None:
        return max_tokens
    return min(DEFAULT_MAX_TOKENS, context - num_prompt_tokens, places - num_prompt_tokens + 1)
