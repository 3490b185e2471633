from __future__ import annotations

import os

import pytest

from mortise.env import Environment, read_environment
from mortise.errors import ConfigError


def test_nothing_set() -> None:
    assert read_environment({}) == Environment(config_path=None, bf16_dispatch=None)


def test_other_variables_are_ignored() -> None:
    assert read_environment({"MORTISE_CONFIGURATION": "x", "HOME": "y"}) == Environment()


def test_the_process_environment_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MORTISE_CONFIG", "engine.toml")
    assert read_environment().config_path == "engine.toml"


def test_an_empty_variable_counts_as_not_set() -> None:
    environ = {"MORTISE_CONFIG": "", "SGLANG_DEEPEP_BF16_DISPATCH": " "}
    assert read_environment(environ) == Environment()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1", True),
        ("TRUE", True),
        ("yes", True),
        (" on ", True),
        ("0", False),
        ("False", False),
        ("no", False),
        ("off", False),
    ],
)
def test_the_deprecated_variable_is_read_and_warned_about(text: str, expected: bool) -> None:
    with pytest.warns(DeprecationWarning, match=r"dispatch\.dtype = \"bf16\""):
        environment = read_environment({"SGLANG_DEEPEP_BF16_DISPATCH": text})
    assert environment.bf16_dispatch is expected


def test_the_warning_names_the_caller() -> None:
    with pytest.warns(DeprecationWarning, match="is deprecated") as caught:
        read_environment({"SGLANG_DEEPEP_BF16_DISPATCH": "1"})
    assert caught[0].filename == __file__


def test_a_text_that_cannot_be_read_is_an_error() -> None:
    with pytest.raises(ConfigError) as caught:
        read_environment({"SGLANG_DEEPEP_BF16_DISPATCH": "maybe"})
    assert str(caught.value).splitlines() == [
        "environment variable SGLANG_DEEPEP_BF16_DISPATCH is 'maybe'",
        "  expected: one of 1, true, yes, on or 0, false, no, off",
        "  remedy: correct or unset SGLANG_DEEPEP_BF16_DISPATCH",
    ]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_reading_writes_nothing() -> None:
    environ = {"MORTISE_CONFIG": "a", "SGLANG_DEEPEP_BF16_DISPATCH": "1"}
    before, process_before = dict(environ), dict(os.environ)
    read_environment(environ)
    assert environ == before
    assert dict(os.environ) == process_before


def test_the_record_is_frozen() -> None:
    with pytest.raises(AttributeError):
        Environment().config_path = "x"  # type: ignore[misc]
