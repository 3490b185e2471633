"""Work that takes its time shows a bar, on a terminal alone."""

from __future__ import annotations

import io
import sys
from functools import partial
from typing import TYPE_CHECKING

import pytest
from rich.console import Console

from mortise.cli import session
from mortise.testing.distributions import QKV_SPLIT, FakeDistribution, backend_code
from tests.cli.command_line import mortise

if TYPE_CHECKING:
    from pathlib import Path

WARNING = """
@classmethod
def create(cls, context):
    import warnings
    for text in ("a cable is loose", "a cable is loose", "a fan is slow"):
        warnings.warn(text, RuntimeWarning)
    return cls()
"""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, patience: float) -> str:
    """What work that is told of twice writes to standard error."""
    # Whatever terminal the tests themselves run in, or none.
    console = partial(Console, file=stream, width=80, _environ={"TERM": "xterm"})
    monkeypatch.setattr(session, "messages", console)
    monkeypatch.setattr(session, "PATIENCE_SECONDS", patience)
    # Here and not in a fixture: pytest puts its own stream in place before the test begins.
    monkeypatch.setattr(sys, "stderr", stream)
    with session.progress_bar("loading", is_bytes=True) as advance:
        advance(10, 100)
        advance(100, 100)
    return stream.getvalue()


def test_long_work_shows_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(monkeypatch, Terminal(), patience=0.0)
    assert "loading" in text
    assert "100/100 bytes" in text


def test_short_work_shows_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(monkeypatch, Terminal(), patience=60.0) == ""


def test_a_pipe_gets_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(monkeypatch, io.StringIO(), patience=0.0) == ""


@pytest.mark.filterwarnings("default")
def test_what_a_backend_warns_of_is_told_once_as_news(tiny_model: Path, tmp_path: Path) -> None:
    distributions = FakeDistribution(tmp_path)
    distributions.add_backend("warning", code=backend_code(QKV_SPLIT + WARNING))
    with distributions.installed():
        outcome = mortise(
            "generate", "--model", tiny_model, "--backend", "warning", "--dtype", "float32",
            "--max-tokens", "1", "--ignore-eos", "a",
        )  # fmt: skip
    assert outcome.code == 0, outcome
    assert outcome.stderr.count("warning: a cable is loose\n") == 1
    assert outcome.stderr.count("warning: a fan is slow\n") == 1
    assert "RuntimeWarning" not in outcome.stderr
