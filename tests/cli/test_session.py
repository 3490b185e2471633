"""Work that takes its time shows a bar, on a terminal alone."""

from __future__ import annotations

import io
import sys
from typing import TYPE_CHECKING

from mortise.cli import session

if TYPE_CHECKING:
    import pytest


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, patience: float) -> str:
    """What work that is told of twice writes to standard error."""
    monkeypatch.setenv("TERM", "xterm")
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
