"""The kit as a class of pytest tests: subclass it, name the backend."""

# pytest is imported by what runs inside it alone, so that the kit can be listed without it.

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

from mortise.conformance.checks import items
from mortise.conformance.records import FaultError, Level, NotAskedError
from mortise.conformance.subject import Subject

if TYPE_CHECKING:
    from collections.abc import Mapping

    import pytest

    from mortise.conformance.records import Item

PROPERTY = "mortise-conformance"
"""Under which a test's report carries how its check ended."""


class ConformanceTests:
    """Every check of the kit, one test for each of its cases.

    ::

        from mortise.conformance import ConformanceTests


        class TestConformance(ConformanceTests):
            backend = "toy"

    Attributes:
        backend: name of the backend; the option ``--mortise-backend`` where it is empty.
        device: the configured device text (``emulated``), or None for the backend's own.
        options: the backend's own table of the configuration.
        levels: what to ask.
    """

    backend: ClassVar[str] = ""
    device: ClassVar[str | None] = None
    options: ClassVar[Mapping[str, object]] = MappingProxyType({})
    levels: ClassVar[tuple[Level, ...]] = tuple(Level)

    @classmethod
    def pytest_generate_tests(cls, metafunc: pytest.Metafunc) -> None:
        """Ask which checks there are for this backend."""
        level = Level(metafunc.function.__name__.removeprefix("test_"))
        subject, levels = cls._subject(metafunc.config)
        wanted = list(items(subject, level)) if subject is not None and level in levels else []
        metafunc.parametrize(
            ("subject", "item"), [(subject, item) for item in wanted], ids=list(map(str, wanted))
        )

    @classmethod
    def _subject(cls, config: pytest.Config) -> tuple[Subject | None, tuple[Level, ...]]:
        from mortise.conformance.plugin import requested

        if not cls.backend:
            return requested(config)
        # One for all levels, so that a backend is bound once for most of the kit.
        if "_made" not in vars(cls):
            cls._made = Subject(cls.backend, cls.device, cls.options)
        return cls._made, cls.levels

    _made: ClassVar[Subject]

    def test_static(self, subject: Subject, item: Item, request: pytest.FixtureRequest) -> None:
        """What the installed files say."""
        _ask(subject, item, request)

    def test_host(self, subject: Subject, item: Item, request: pytest.FixtureRequest) -> None:
        """What a bound backend says of itself."""
        _ask(subject, item, request)

    def test_device(self, subject: Subject, item: Item, request: pytest.FixtureRequest) -> None:
        """What its hooks compute."""
        _ask(subject, item, request)


def _ask(subject: Subject, item: Item, request: pytest.FixtureRequest) -> None:
    import pytest

    ended: dict[str, Any] = {"level": item.check.level.value, "check": str(item)}
    request.node.user_properties.append((PROPERTY, ended))
    try:
        measured = item.run(subject)
    except NotAskedError as why:
        ended["skipped"] = str(why)
        pytest.skip(str(why))
    except FaultError as fault:
        ended["failed"] = str(fault)
        pytest.fail(f"{item}\n{fault}", pytrace=False)
    if measured is not None:
        ended["measured"] = (measured.subject, measured.error, measured.tolerance)
