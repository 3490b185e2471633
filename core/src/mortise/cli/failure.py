"""An error as its reader sees it: four parts for people, one document for programs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from mortise.cli.output import document, print_json, say
from mortise.cli.speaker import is_speaker, own_launch

if TYPE_CHECKING:
    from mortise.errors import MortiseError


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """What happened, what was found, what was expected, what to do."""

    kind: str
    what: str
    details: tuple[str, ...] = ()
    expected: str | None = None
    remedy: str | None = None
    reason: str | None = None

    @classmethod
    def of(cls, error: MortiseError) -> Self:
        """Of an error of Mortise; notes that were added on its way up become details."""
        reason = getattr(error, "reason", None)
        return cls(
            kind=type(error).__name__,
            what=error.what,
            details=(*error.details, *getattr(error, "__notes__", ())),
            expected=error.expected,
            remedy=error.remedy,
            reason=None if reason is None else str(reason),
        )

    def lines(self) -> list[str]:
        """Everything below the first line."""
        lines = [f"  {line}" for detail in self.details for line in detail.splitlines()]
        if self.expected:
            lines.append(f"  expected: {self.expected}")
        if self.remedy:
            lines.append(f"  remedy: {self.remedy}")
        return lines


def show_failure(failure: Failure, as_json: bool) -> None:
    """Print a failure to standard error: as text, or as ``{"schema": 1, "error": {...}}``."""
    if as_json:
        fields = {
            "type": failure.kind,
            "reason": failure.reason,
            "what": failure.what,
            "details": list(failure.details),
            "expected": failure.expected,
            "remedy": failure.remedy,
        }
        print_json(document(error=fields), err=True)
        return
    say("error", "bold red", "\n".join([failure.what, *failure.lines()]))


def show_warning(text: str) -> None:
    """Print news to standard error, once if there are several processes."""
    if is_speaker(own_launch()):
        say("warning", "bold yellow", text)
