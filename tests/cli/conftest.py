"""A stand-in for the model that comes with Mortise."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from mortise.checkpoint import directory

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def builtin(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let ``builtin`` be the tiny random model, which takes no time."""
    monkeypatch.setattr(directory, "builtin_model_path", lambda: tiny_model)
    return tiny_model
