"""How one request wants its tokens chosen, and when it wants to stop."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from mortise.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Sequence

MAX_LOGPROBS: Final = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Checked when made; every field has the meaning it has in transformers and vLLM.

    The filters apply in this order: temperature, ``top_k``, ``top_p``.

    Args:
        max_tokens: tokens to generate at most. None means 128, or fewer where the context or the
            cache ends before; a number that does not fit is refused.
        temperature: divides the logits; 0 takes the most likely token (greedy).
        top_p: keep the smallest set of most likely tokens whose probabilities reach this.
        top_k: keep this many most likely tokens; 0 keeps all.
        seed: of this request's own random numbers; None draws one, which the completion reports.
        stop: one text or several that end the completion; they are not part of its text.
        stop_token_ids: tokens that end it, beside the model's own end-of-text tokens.
        ignore_eos: generate on past the model's end-of-text tokens.
        logprobs: report the log-probability of each token and of this many most likely ones, as
            the model gives them, before any filter; None reports none.
        token_healing: choose the last token of a prompt that was given as text again, among the
            tokens that begin with it, so that the text can go on within it; prompts of token ids
            and conversations stay as they are. The token that takes its place counts as generated.

    Raises:
        RequestError: a value has the wrong type or is out of range.
    """

    max_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    token_healing: bool = False

    def __post_init__(self) -> None:
        check_integer("max_tokens", self.max_tokens, low=1, optional=True)
        check_number("temperature", self.temperature, "a number of at least 0", low=0.0)
        check_number("top_p", self.top_p, "a number above 0 and at most 1", above=0.0, high=1.0)
        check_integer("top_k", self.top_k, low=0)
        check_integer("seed", self.seed, low=0, optional=True)
        check_integer("logprobs", self.logprobs, low=0, high=MAX_LOGPROBS, optional=True)
        check_flag("ignore_eos", self.ignore_eos)
        check_flag("token_healing", self.token_healing)
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        for text in sequence("stop", stop, "texts"):
            if not isinstance(text, str) or not text:
                raise wrong("stop", text, "texts that are not empty")
        token_ids = sequence("stop_token_ids", self.stop_token_ids, "integers")
        for token_id in token_ids:
            check_integer("stop_token_ids", token_id, low=0)
        # Made hashable and unchangeable, whatever sequence was given.
        object.__setattr__(self, "stop", tuple(stop))
        object.__setattr__(self, "stop_token_ids", token_ids)

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is taken, without chance."""
        return self.temperature == 0.0


def check_integer(
    name: str, value: object, *, low: int, high: int | None = None, optional: bool = False
) -> None:
    """Refuse what is no integer from ``low`` to ``high``; a boolean is none."""
    if value is None and optional:
        return
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    if not is_integer or value < low or (high is not None and value > high):  # type: ignore[operator]
        limits = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise wrong(name, value, f"an integer {limits}{', or None' if optional else ''}")


def check_number(
    name: str,
    value: object,
    expected: str,
    *,
    low: float = -math.inf,
    above: float = -math.inf,
    high: float = math.inf,
) -> None:
    """Refuse what is no finite number within the limits."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not (math.isfinite(value) and low <= value <= high and value > above):  # type: ignore[arg-type,operator]
        raise wrong(name, value, expected)


def check_flag(name: str, value: object) -> None:
    """Refuse what is not True or False."""
    if not isinstance(value, bool):
        raise wrong(name, value, "true or false")


def sequence(name: str, value: object, of_what: str) -> tuple[object, ...]:
    """A list or tuple as a tuple."""
    if not isinstance(value, list | tuple):
        raise wrong(name, value, f"a list or tuple of {of_what}")
    return tuple(value)


def wrong(name: str, value: object, expected: str) -> RequestError:
    """The error for one field."""
    return RequestError(
        f"{name} is {value!r}", expected=expected, remedy=f"correct {name} of the request"
    )
