"""What holds for the tests of the core and of every plugin."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.environment_guard import GuardPlugin

if TYPE_CHECKING:
    import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Let no test write an environment variable."""
    config.pluginmanager.register(GuardPlugin(), "environment-guard")
