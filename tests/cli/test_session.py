"""Work that takes its time shows a bar, on a terminal alone."""

from __future__ import annotations

import io
import sys
from functools import partial
from typing import TYPE_CHECKING

from rich.console import Console

from mortise.cli import session

if TYPE_CHECKING:
    import pytest


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
