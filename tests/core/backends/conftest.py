"""Folders of distributions that look installed for the time of one test."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from mortise.testing.distributions import FakeDistribution

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def installed(tmp_path: Path) -> Iterator[FakeDistribution]:
    """A folder on ``sys.path``; what a test adds is installed until it ends."""
    with FakeDistribution(tmp_path / "site").installed() as distributions:
        yield distributions


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[FakeDistribution]:
    """A second such folder, later on ``sys.path`` than the first."""
    with FakeDistribution(tmp_path / "elsewhere").installed() as distributions:
        yield distributions
