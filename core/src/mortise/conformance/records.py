"""What a check of the kit is, and the three ways in which it ends besides passing."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from mortise.conformance.subject import Subject
    from mortise.plugin import Capabilities


class Level(StrEnum):
    """What a check needs."""

    STATIC = "static"
    """The installed files alone."""
    HOST = "host"
    """A bound backend; nothing is computed that a device would be needed for."""
    DEVICE = "device"
    """The backend's device, or its emulation: hooks compute."""


class FaultError(Exception):
    """The backend does not keep the contract; the text names the hook, the case and the fault."""


class NotAskedError(Exception):
    """The check does not apply here; the text says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """How far results were from the reference.

    Args:
        subject: the hook, and the scheme or number format where there is one.
        error: relative, largest over what the tolerance is for.
        tolerance: the most that is allowed.
    """

    subject: str
    error: float
    tolerance: float

    @property
    def badness(self) -> tuple[float, float]:
        """Larger is worse; of two that are as good, the one that asked for less."""
        return self.error / self.tolerance, -self.tolerance


def worst(measured: Iterable[Measured]) -> Measured:
    """The one that is furthest off of what is allowed."""
    return max(measured, key=lambda one: one.badness)


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One question of the kit.

    Its name is that of ``run``, and what it asks is the first paragraph of its docstring.

    Args:
        run: called with the backend, and with the case where there are ``cases``; raises
            :class:`FaultError` or :class:`NotAskedError`, and may return what it measured.
        level: what it needs.
        hook: the hook it is about; asked only of backends that answer it themselves.
        cases: the cases that what a backend declares of itself asks for; each has a ``str``.
    """

    run: Callable[..., Measured | None]
    level: Level
    hook: str | None = None
    cases: Callable[[Capabilities], Iterable[Any]] | None = None

    @property
    def name(self) -> str:
        """In the words of a terminal: dashes, no underscores."""
        return self.run.__name__.replace("_", "-")

    @property
    def asks(self) -> str:
        """One sentence."""
        text = (self.run.__doc__ or "").strip().split("\n\n")[0]
        return " ".join(text.split())


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """A check with one of its cases."""

    check: Check
    case: Any = None

    def __str__(self) -> str:
        return self.check.name if self.case is None else f"{self.check.name}-{self.case}"

    def run(self, subject: Subject) -> Measured | None:
        """Ask.

        Raises:
            FaultError: the answer is wrong; errors that the backend raised are told as faults.
            NotAskedError: the question does not apply.
        """
        hook = self.check.hook
        if hook is not None:
            subject.require_hook(hook)
        if self.check.cases is not None and self.case is None:
            assert subject.bound is not None
            raise NotAskedError("nothing that the backend declares of itself asks for it")
        try:
            if self.case is None:
                return self.check.run(subject)
            return self.check.run(subject, self.case)
        except (FaultError, NotAskedError):
            raise
        except Exception as error:
            raise FaultError(_raised(error, self)) from error


def _raised(error: Exception, item: Item) -> str:
    """What a backend raised where an answer was wanted: the error, its notes, the place."""
    lines = [f"raised {type(error).__name__}: {error}", *getattr(error, "__notes__", ())]
    if item.check.hook is not None:
        lines[0] = f"{item.check.hook} {lines[0]}"
    if item.case is not None:
        lines.append(f"case: {item.case}")
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is not None:
        lines.append(f"at {trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}")
    return "\n".join(lines)
