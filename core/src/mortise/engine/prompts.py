"""What users give as prompts, made into tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from mortise.engine.sampling_params import SamplingParams
from mortise.errors import RequestError

if TYPE_CHECKING:
    from mortise.checkpoint import Tokenizer


@dataclass(frozen=True, slots=True)
class Prompt:
    """The tokens of one prompt, and its text where it was given as text.

    Args:
        token_ids: its tokens, special ones included.
        text: what they say.
        is_plain_text: whether it is a text as somebody wrote it, whose last token may be healed;
            the tokens of a conversation end where the model was trained to go on.
    """

    token_ids: tuple[int, ...]
    text: str | None = None
    is_plain_text: bool = False


def prompts_of(prompts: object, tokenizer: Tokenizer | None) -> list[Prompt]:
    """A text, a :class:`Prompt`, the tokens of one, or a list of these.

    Raises:
        RequestError: it is something else, or a text where there is no tokenizer.
    """
    if isinstance(prompts, str | Prompt) or _is_tokens(prompts):
        return [_prompt_of(prompts, tokenizer)]
    if not isinstance(prompts, Iterable) or isinstance(prompts, bytes | bytearray | dict):
        raise _no_prompt(prompts)
    return [_prompt_of(prompt, tokenizer) for prompt in prompts]


def sampling_of(
    sampling: SamplingParams | Sequence[SamplingParams], count: int
) -> list[SamplingParams]:
    """One for each of ``count`` prompts.

    Raises:
        RequestError: there are more or fewer.
    """
    if isinstance(sampling, SamplingParams):
        return [sampling] * count
    if len(sampling) != count:
        raise RequestError(
            f"{len(sampling)} sampling parameters are given for {count} prompts",
            expected="one for all prompts, or one for each",
            remedy="give as many as there are prompts",
        )
    return list(sampling)


def token_ids_of(value: object) -> tuple[int, ...]:
    """Token ids as a tuple: of a sequence, or of a tensor or array of one dimension.

    Raises:
        RequestError: they are not integers.
    """
    listed = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(listed, list | tuple) or not _is_tokens(listed):
        raise _no_prompt(value)
    return tuple(listed)


def _prompt_of(prompt: object, tokenizer: Tokenizer | None) -> Prompt:
    if isinstance(prompt, Prompt):
        return prompt
    if not isinstance(prompt, str):
        return Prompt(token_ids_of(prompt))
    if tokenizer is None:
        raise RequestError(
            f"the prompt is a text ({_shortened(prompt)}), and this model has no tokenizer.json",
            expected="token ids",
            remedy="give a list of token ids, or add tokenizer.json to the model directory",
        )
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"the prompt is not text: character {error.start} stands for a byte that is not UTF-8",
            expected="text, which is UTF-8",
            remedy="correct the prompt at that place",
        ) from None
    return Prompt(tuple(tokenizer.encode(prompt)), prompt, is_plain_text=True)


def _is_tokens(value: object) -> bool:
    if hasattr(value, "tolist"):
        return getattr(value, "ndim", 0) == 1
    return (
        isinstance(value, list | tuple)
        and bool(value)
        and all(
            isinstance(item, int) and not isinstance(item, bool)
            for item in cast("list[object]", value)
        )
    )


def _no_prompt(value: object) -> RequestError:
    return RequestError(
        f"a prompt is {_shortened(value)} ({type(value).__name__})",
        expected="a text, or a list of token ids",
        remedy="give one of these, or a list of them",
    )


def _shortened(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
