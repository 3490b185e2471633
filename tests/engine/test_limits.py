"""Requests that cannot be served are refused with the numbers that explain it."""

from __future__ import annotations

import pytest

from mortise.engine.limits import DEFAULT_MAX_TOKENS, check_prompt, new_token_limit
from mortise.engine.sampling_params import SamplingParams
from mortise.errors import CapacityError, PromptTooLongError, RequestError


def limit(num_prompt_tokens: int, max_tokens: int | None = None, **limits: int) -> int:
    sizes = {"context": 512, "num_pages": 100} | limits
    return new_token_limit(num_prompt_tokens=num_prompt_tokens, max_tokens=max_tokens, **sizes)


def test_by_default_as_many_as_fit_up_to_a_limit() -> None:
    assert limit(10) == DEFAULT_MAX_TOKENS
    assert limit(500) == 12
    assert limit(511) == 1
    assert limit(120, num_pages=2) == 9  # the last token is never read back
    assert limit(128, num_pages=2) == 1


def test_what_was_asked_for_is_given_in_full() -> None:
    assert limit(12, 500) == 500
    assert limit(100, 29, num_pages=2) == 29


@pytest.mark.parametrize(
    ("num_prompt_tokens", "max_tokens", "words"),
    [
        (512, None, "the prompt has 512 tokens"),
        (9000, 1, "the prompt has 9000 tokens"),
        (500, 13, "500 tokens and max_tokens is 13, which makes 513"),
    ],
)
def test_more_than_the_context_is_refused(
    num_prompt_tokens: int, max_tokens: int | None, words: str
) -> None:
    with pytest.raises(PromptTooLongError) as caught:
        limit(num_prompt_tokens, max_tokens)
    assert words in caught.value.what
    assert "512" in str(caught.value.expected)
    assert caught.value.remedy


@pytest.mark.parametrize(("num_prompt_tokens", "max_tokens"), [(100, 30), (129, None), (129, 1)])
def test_more_than_the_cache_is_refused(num_prompt_tokens: int, max_tokens: int | None) -> None:
    with pytest.raises(CapacityError, match="at most 128: 2 pages of 64 tokens"):
        limit(num_prompt_tokens, max_tokens, num_pages=2)


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ([], "the prompt is empty"),
        ([1, 97], "token 1 of the prompt is 97"),
        ([-1], "token 0 of the prompt is -1"),
    ],
)
def test_a_prompt_of_no_or_unknown_tokens_is_refused(prompt: list[int], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        check_prompt(prompt, 97)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("max_tokens", 0, "an integer of at least 1, or None"),
        ("max_tokens", 1.5, "an integer of at least 1, or None"),
        ("max_tokens", True, "an integer of at least 1, or None"),
        ("temperature", -0.1, "a number of at least 0"),
        ("temperature", float("nan"), "a number of at least 0"),
        ("temperature", float("inf"), "a number of at least 0"),
        ("temperature", "1", "a number of at least 0"),
        ("top_p", 0.0, "a number above 0 and at most 1"),
        ("top_p", 1.01, "a number above 0 and at most 1"),
        ("top_k", -1, "an integer of at least 0"),
        ("seed", -1, "an integer of at least 0, or None"),
        ("stop", [""], "texts that are not empty"),
        ("stop", [1], "texts that are not empty"),
        ("stop", 5, "a list or tuple of texts"),
        ("stop_token_ids", [-1], "an integer of at least 0"),
        ("stop_token_ids", "ab", "a list or tuple of integers"),
        ("logprobs", 21, "an integer from 0 to 20, or None"),
        ("ignore_eos", 1, "true or false"),
    ],
)
def test_a_wrong_value_is_named_with_its_range(field: str, value: object, expected: str) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{field: value})
    shown = value[0] if isinstance(value, list) else value
    assert caught.value.what == f"{field} is {shown!r}"
    assert caught.value.expected == expected
    assert field in str(caught.value.remedy)


def test_lists_are_kept_as_values_that_cannot_change() -> None:
    params = SamplingParams(stop=["a", "b"], stop_token_ids=[1])
    assert (params.stop, params.stop_token_ids) == (("a", "b"), (1,))
    assert SamplingParams(stop="end").stop == ("end",)
    assert hash(params) == hash(SamplingParams(stop=("a", "b"), stop_token_ids=(1,)))
