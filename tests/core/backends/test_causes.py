from __future__ import annotations

import pytest

from mortise.backends.causes import cause_and_consequences, chain_of, describe


def fail_to_load() -> None:
    try:
        try:
            raise OSError("undefined symbol")
        except OSError as error:
            raise ImportError("cannot load the extension") from error
    except ImportError:
        raise RuntimeError("failed to load")  # noqa: B904 - the implicit chain counts too


def fail_on_its_own() -> None:
    try:
        raise OSError("expected here")
    except OSError:
        raise RuntimeError("the real one") from None


def test_the_first_exception_comes_first() -> None:
    with pytest.raises(RuntimeError) as caught:
        fail_to_load()
    cause, lines = cause_and_consequences(caught.value)
    assert cause == "OSError: undefined symbol"
    assert lines[0].startswith(f"raised in {__file__}, line ")
    assert lines[1:] == [
        "which led to ImportError: cannot load the extension",
        "which led to RuntimeError: failed to load",
    ]


def test_a_suppressed_context_does_not_count() -> None:
    with pytest.raises(RuntimeError) as caught:
        fail_on_its_own()
    assert chain_of(caught.value) == [caught.value]


def test_a_chain_that_bites_its_tail_ends() -> None:
    one, two = ValueError("one"), ValueError("two")
    one.__cause__, two.__cause__ = two, one
    assert chain_of(one) == [two, one]


def test_an_exception_without_words_is_its_class() -> None:
    assert describe(ValueError()) == "ValueError"
    assert describe(ValueError("two\n  lines")) == "ValueError: two lines"
