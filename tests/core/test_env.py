from __future__ import annotations

import os
import subprocess
import sys

import pytest

from mortise.env import Environment, Launch, read_environment
from mortise.errors import ConfigError

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "29500",
}


def test_nothing_set() -> None:
    assert read_environment({}) == Environment(config_path=None, bf16_dispatch=None)


def test_other_variables_are_ignored() -> None:
    assert read_environment({"MORTISE_CONFIGURATION": "x", "HOME": "y"}) == Environment()


def test_the_process_environment_is_the_default() -> None:
    code = "from mortise.env import read_environment; print(read_environment().config_path)"
    child = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "MORTISE_CONFIG": "engine.toml"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert child.stdout == "engine.toml\n"


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


def test_what_torchrun_sets_is_one_record() -> None:
    launch = Launch(rank=3, world_size=4, local_rank=1, master_addr="localhost", master_port=29500)
    assert read_environment(TORCHRUN).launch == launch


@pytest.mark.parametrize(("text", "served"), [("True", True), ("False", False), ("", False)])
def test_torchrun_says_whether_it_listens_itself(text: str, served: bool) -> None:
    launch = read_environment(TORCHRUN | {"TORCHELASTIC_USE_AGENT_STORE": text}).launch
    assert launch is not None
    assert launch.agent_store is served


@pytest.mark.parametrize("name", TORCHRUN)
def test_a_missing_variable_of_torchrun_is_named(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_environment(TORCHRUN | {name: ""})
    assert caught.value.what == f"environment variables of torchrun are missing: {name}"
    assert caught.value.expected == (
        "all of RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT, or none"
    )


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("RANK", "4", "a number from 0 to 3"),
        ("RANK", "-1", "a number from 0 to 3"),
        ("RANK", "first", "a number from 0 to 3"),
        ("WORLD_SIZE", "0", "a number from 1 to 2147483647"),
        ("LOCAL_RANK", "1.5", "a number from 0 to 3"),
        ("MASTER_PORT", "65536", "a number from 1 to 65535"),
    ],
)
def test_an_impossible_number_of_torchrun_is_named(name: str, text: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_environment(TORCHRUN | {name: text})
    assert caught.value.what == f"environment variable {name} is {text!r}"
    assert caught.value.expected == expected


def test_the_record_is_frozen() -> None:
    with pytest.raises(AttributeError):
        Environment().config_path = "x"  # type: ignore[misc]
