"""Fails every test, and every import of a test module, that changes the process's environment.

An audit hook hears each write that Python makes, by whomever and even if it is taken back;
comparing the variables from step to step finds what goes around it. ``conftest.py`` beside
``pyproject.toml`` sets the guard for all tests.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

import pytest

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping

EVENTS: Final = frozenset({"os.putenv", "os.unsetenv"})
MACHINERY: Final = frozenset({__name__, "os", "collections.abc"})

ALLOWED: Final[Mapping[str, str]] = MappingProxyType(
    {
        # pytest tells there what it is running, and takes it back.
        "PYTEST_CURRENT_TEST": "_pytest.runner",
        # numpy sets it while it imports its library of linear algebra, and takes it back.
        "OPENBLAS_MAIN_FREE": "numpy._core",
        # torch names the folder of compiled code as soon as something looks at its compiler.
        "TORCHINDUCTOR_CACHE_DIR": "torch._inductor.runtime.cache_dir_utils",
    }
)
"""The variables that a library writes, and the one module that may do so."""


@dataclass
class EnvironmentGuard:
    """What was written since it was last asked."""

    heard: dict[str, str] = field(default_factory=dict)
    before: dict[str, str] = field(default_factory=lambda: dict(os.environ))

    def hear(self, event: str, arguments: tuple[object, ...]) -> None:
        """Remember who wrote a variable first, unless this module may; called for every event."""
        if event not in EVENTS:
            return
        variable = arguments[0]
        name = os.fsdecode(variable) if isinstance(variable, bytes | str) else str(variable)
        module, place = writer()
        if ALLOWED.get(name) != module:
            self.heard.setdefault(name, f"{name}, in {place}")

    def changes(self) -> list[str]:
        """Each variable that was written, and where; then start afresh."""
        now = dict(os.environ)
        differing = {name for name, _ in self.before.items() ^ now.items()}
        unheard = sorted(differing - set(self.heard) - set(ALLOWED))
        found = [*self.heard.values(), *(f"{name}, past os.environ" for name in unheard)]
        self.heard, self.before = {}, now
        return found


def writer() -> tuple[str, str]:
    """Module and line of the innermost code that is not the machinery of ``os.environ``."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__") in MACHINERY:
        frame = frame.f_back
    place = f"{frame.f_code.co_filename}:{frame.f_lineno}"
    return frame.f_globals.get("__name__", ""), place


def complaint(changes: list[str]) -> str:
    """What to say to the author of a test."""
    return (
        f"the environment of the process was written: {'; '.join(changes)}\n"
        "pass a mapping to read_environment, or env= to a child process"
    )


class GuardPlugin:
    """Asks after each step of a test and after each import of a test module."""

    def __init__(self) -> None:
        self.guard = EnvironmentGuard()
        # It cannot be taken away again, so a process has one.
        sys.addaudithook(self.guard.hear)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_setup(self) -> Generator[None, object, object]:
        return (yield from self._guarded())

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_call(self) -> Generator[None, object, object]:
        return (yield from self._guarded())

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_teardown(self) -> Generator[None, object, object]:
        return (yield from self._guarded())

    @pytest.hookimpl(wrapper=True)
    def pytest_make_collect_report(
        self,
    ) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
        report = yield
        if changes := self.guard.changes():
            report.outcome = "failed"
            report.longrepr = complaint(changes)
        return report

    def _guarded(self) -> Generator[None, object, object]:
        result = yield
        if changes := self.guard.changes():
            pytest.fail(complaint(changes), pytrace=False)
        return result
