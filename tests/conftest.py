"""Fixtures of every test."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

from tests.fixtures.tiny_models import save_tiny

if TYPE_CHECKING:
    from pathlib import Path

# Tests share the machine, so the time of an example says nothing; the same examples every time.
settings.register_profile("mortise", deadline=None, derandomize=True)
settings.load_profile("mortise")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random DeepSeek-V3.2 with a tokenizer of bytes, context 512; not to be changed."""
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny-v32")
