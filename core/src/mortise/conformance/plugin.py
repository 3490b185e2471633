"""The kit as a plugin of pytest: options that name the backend, and a record of what was found."""

# pytest -p mortise.conformance.plugin --pyargs mortise.conformance.suite --mortise-backend NAME

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from mortise.conformance.options import option_table
from mortise.conformance.records import Level
from mortise.conformance.subject import Subject
from mortise.conformance.testcase import PROPERTY

if TYPE_CHECKING:
    import pytest

NAME: Final = "mortise-conformance-run"


class Run:
    """One run of the kit within pytest.

    Args:
        subject: the backend, or None where no option names one.
        levels: what to ask.
    """

    def __init__(self, subject: Subject | None, levels: tuple[Level, ...]) -> None:
        self.subject = subject
        self.levels = levels
        self.ended: list[dict[str, Any]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep how each check ended."""
        if report.when != "call":
            return
        for name, ended in report.user_properties:
            if name == PROPERTY:
                assert isinstance(ended, dict)
                if report.failed and "failed" not in ended:
                    ended["failed"] = report.longreprtext
                self.ended.append(ended)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options that name the backend."""
    group = parser.getgroup("mortise", "conformance of a Mortise backend")
    group.addoption("--mortise-backend", default="", help="name of the backend to examine")
    group.addoption("--mortise-device", default=None, help="device text, for example emulated")
    group.addoption(
        "--mortise-option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="an entry of the backend's own table; may be repeated",
    )
    group.addoption(
        "--mortise-level",
        action="append",
        default=[],
        choices=[level.value for level in Level],
        help="ask this level; may be repeated; all by default",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Make the run that the options describe."""
    name = config.getoption("--mortise-backend")
    options = option_table(config.getoption("--mortise-option"))
    chosen = [Level(text) for text in config.getoption("--mortise-level")]
    subject = Subject(name, config.getoption("--mortise-device"), options) if name else None
    config.pluginmanager.register(Run(subject, tuple(chosen) or tuple(Level)), NAME)


def requested(config: pytest.Config) -> tuple[Subject | None, tuple[Level, ...]]:
    """The backend and the levels that the options name; no backend without this plugin."""
    run = config.pluginmanager.get_plugin(NAME)
    return (run.subject, run.levels) if isinstance(run, Run) else (None, ())
