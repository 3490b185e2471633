"""One row of the decision table: an installed backend, how far it came, and what stopped it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from mortise.backends.manifest import Manifest
    from mortise.spec.reasons import ReasonCode


class Stage(StrEnum):
    """The last stage of its life that a backend passed."""

    FOUND = "found"
    """Its entry point is installed."""
    READ = "read"
    """Its manifest could be read."""
    COMPATIBLE = "compatible"
    """Name, engine range and hook versions fit this core."""
    DEVICE_SEEN = "device seen"
    """Its probe saw the device; only ``auto`` looks."""
    SELECTED = "selected"
    BOUND = "bound"


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One installed backend.

    Args:
        name: name of its entry point, which configurations use.
        distribution: name of the distribution that brings it, normalised.
        version: version of that distribution.
        location: folder in which the distribution is installed.
        entry: value of its entry point, ``package:backend.toml``.
        manifest_path: where the manifest was read.
        manifest: None where it could not be read.
        stage: the last stage it passed.
        reason: why it cannot be used, or was or was not chosen; None: nothing was decided yet.
        explanation: the reason in words.
        remedy: what to do about it.
        notes: news about it that stops nothing.
    """

    name: str
    distribution: str
    version: str
    location: str
    entry: str
    manifest_path: str | None = None
    manifest: Manifest | None = None
    stage: Stage = Stage.FOUND
    reason: ReasonCode | None = None
    explanation: str = ""
    remedy: str = ""
    notes: tuple[str, ...] = ()

    @property
    def usable(self) -> bool:
        """Whether nothing speaks against it so far."""
        return self.reason is None

    @property
    def provenance(self) -> str:
        """Distribution, version and place, for messages."""
        return f"{self.distribution} {self.version} ({self.manifest_path or self.location})"

    def rejected(self, reason: ReasonCode, explanation: str, remedy: str = "") -> Candidate:
        """The same row with what stopped it."""
        return replace(self, reason=reason, explanation=explanation, remedy=remedy)


def replace_row(
    candidates: Iterable[Candidate], old: Candidate, new: Candidate
) -> tuple[Candidate, ...]:
    """The table with one row exchanged."""
    return tuple(new if row is old else row for row in candidates)


def decision_table(candidates: Sequence[Candidate]) -> tuple[str, ...]:
    """The rows as aligned lines of text: name, distribution, stage reached, reason."""
    rows = [
        (
            row.name,
            f"{row.distribution} {row.version}",
            row.stage.value,
            f"{row.reason.value}: {row.explanation}" if row.reason else "ok",
        )
        for row in candidates
    ]
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(3)]
    return tuple(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]])
        for row in rows
    )
