"""Whatever happens, the exit code and the message are the promised ones."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

from mortise.cli import session
from tests.cli.command_line import mortise

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

PROGRAM = [sys.executable, "-m", "mortise"]


def child_environment() -> dict[str, str]:
    return {name: text for name, text in os.environ.items() if not name.startswith("MORTISE_")}


def test_version_and_help() -> None:
    assert mortise("--version").stdout == "mortise 0.1.0\n"
    for arguments in (["--help"], ["-h"], ["generate", "--help"], ["eval", "-h"]):
        outcome = mortise(*arguments)
        assert outcome.code == 0
        assert outcome.stdout.startswith("Usage: mortise")


def test_without_a_verb_the_help_is_shown() -> None:
    outcome = mortise()
    assert outcome.code == 0
    assert re.search(r"^  generate +Continue a prompt\.$", outcome.stdout, flags=re.MULTILINE)


def test_a_bug_shows_its_traceback_and_asks_for_a_report(
    builtin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(resolved: object) -> None:
        raise ZeroDivisionError("on purpose")

    monkeypatch.setattr(session, "load_llm", broken)
    outcome = mortise("generate", "x")
    assert outcome.code == 1
    assert "Traceback" in outcome.stderr
    assert "ZeroDivisionError: on purpose" in outcome.stderr
    assert outcome.stderr.endswith("This is a bug: please report it with the lines above.\n")


def test_an_interrupt_ends_quietly(builtin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(resolved: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(session, "load_llm", interrupted)
    outcome = mortise("generate", "x")
    assert outcome.code == 130
    assert outcome.stderr.strip() == "interrupted"


HEARS = """
import runpy, signal
signal.signal(signal.SIGINT, signal.default_int_handler)
runpy.run_module("mortise", run_name="__main__")
"""
"""The program, which hears interrupts even if the tests run in the background of a shell."""


def test_an_interrupt_in_the_middle_of_a_text() -> None:
    """A text that takes seconds, so that a busy machine does not end it first."""
    child = subprocess.Popen(
        [sys.executable, "-c", HEARS, "generate", "x", "--max-tokens", "2000", "--ignore-eos"],
        env=child_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    child.stdout.read(1)
    time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    _, messages = child.communicate(timeout=60)
    assert (child.returncode, messages.strip()) == (130, "interrupted")


def test_a_reader_that_leaves_is_no_error(tiny_model: Path) -> None:
    command = " ".join(
        [*PROGRAM, "generate", "x", "--model", str(tiny_model), "--max-tokens", "400"]
    )
    outcome = subprocess.run(
        ["bash", "-c", f"{command} --quiet | head -c 1; exit ${{PIPESTATUS[0]}}"],
        env=child_environment(),
        capture_output=True,
        check=False,
        timeout=120,
    )
    assert (outcome.returncode, outcome.stderr) == (141, b"")


def test_as_a_module_where_no_locale_is_set(tiny_model: Path) -> None:
    outcome = subprocess.run(
        [*PROGRAM, "generate", "é", "--model", tiny_model, "--max-tokens", "3"],
        env=child_environment() | {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
        capture_output=True,
        check=False,
    )
    assert outcome.returncode == 0, outcome.stderr
    assert outcome.stdout.startswith("é".encode())
    assert b"prompt 2 tokens" in outcome.stderr
