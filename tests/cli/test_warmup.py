"""The verb ``warmup``, and what the other verbs say of compiling."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from mortise.testing.distributions import QKV_SPLIT, FakeDistribution, backend_code
from tests.cli.command_line import mortise

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

COMPILES = """
def warmup(self, request):
    def compile(name):
        if {fails}:
            raise OSError("no compiler")
        self.compiled = [*getattr(self, "compiled", []), name]
    names = ["[red] product", "swiglu"] + (["rarely used"] if request.ahead else [])
    return [WarmupJob(name=name, key=name, run=lambda name=name: compile(name)) for name in names]
"""


@pytest.fixture(autouse=True)
def backends(builtin: Path, tmp_path: Path) -> Iterator[None]:
    """``quick`` compiles two things, ahead of time three; ``broken`` cannot."""
    distributions = FakeDistribution(tmp_path / "site")
    for name, fails in (("quick", "False"), ("broken", "name == 'swiglu'")):
        code = backend_code(QKV_SPLIT + COMPILES.format(fails=fails))
        distributions.add_backend(name, code=code)
    with distributions.installed():
        yield


def test_it_lists_what_it_compiled() -> None:
    outcome = mortise("warmup", "--backend", "quick")
    assert outcome.code == 0, outcome
    lines = outcome.stdout.splitlines()
    assert lines[0].split() == ["compiled", "seconds"]
    assert [line.rsplit(maxsplit=1)[0].strip() for line in lines[1:4]] == [
        "[red] product",
        "swiglu",
        "rarely used",
    ]
    assert lines[4].startswith("3 in ")


def test_it_says_so_where_there_is_nothing_to_compile() -> None:
    outcome = mortise("warmup")
    assert outcome.code == 0
    assert outcome.stdout == "backend 'reference' has nothing to compile for this model\n"


def error_of(*arguments: str) -> str:
    """The message behind the news that the reference answers every hook but one."""
    outcome = mortise(*arguments)
    assert (outcome.code, outcome.stdout) == (2, "")
    warning, error = outcome.stderr.split("error: ")
    assert warning.startswith("warning: ")
    return error


def test_a_failure_is_one_message() -> None:
    message = error_of("warmup", "--backend", "broken")
    assert message.startswith("warming up failed at swiglu: OSError: no compiler\n")
    assert "  backend broken (mortise-broken 1.0)\n" in message


def test_generating_compiles_first_and_says_how_long() -> None:
    arguments = ("generate", "a", "--max-tokens", "1", "--json", "--backend")
    assert mortise(*arguments, "quick").document["warmup_seconds"] > 0
    assert error_of("generate", "a", "--backend", "broken").startswith("warming up failed")


def test_explaining_compiles_nothing() -> None:
    outcome = mortise("explain", "--json", "--backend", "broken")
    assert outcome.code == 0, outcome.stderr
    (decision,) = [one for one in outcome.document["decisions"] if one["subject"] == "warm-up"]
    assert decision["value"] == "2 jobs"
    assert "compiles for this model before it is ready" in decision["reason"]
