"""What the conformance kit found of a backend, as a file that its distribution may ship."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mortise.errors import ConfigError

if TYPE_CHECKING:
    from mortise.backends.candidate import Candidate


KIT_VERSION: Final = 1
"""Of the kit that this core brings; raised whenever a check is added or asks for more."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class LevelCounts(_Record):
    """How the checks of one level ended."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0


class WorstError(_Record):
    """The largest relative error of one hook and scheme, beside what is allowed."""

    error: float
    tolerance: float


class EndedCheck(_Record):
    """A check that failed or was skipped, and why."""

    check: str
    reason: str


class ConformanceVerdict(_Record):
    """The outcome of one run of the kit.

    Args:
        schema: version of this file's format, 1.
        kit: version of the kit.
        core: version of the core.
        backend, distribution, version: who was examined.
        device: the torch device its tensors were on; empty where it could not be bound.
        emulated: a chip was computed elsewhere.
        date: day of the run, ISO 8601.
        hooks: version of each hook that it answers itself.
        options: the backend's own table of the run.
        selected: only checks that match this expression were asked; empty: all.
        levels: counts by level.
        worst: largest errors by hook and scheme.
        skipped, failed: which checks, and why.
    """

    schema_version: Literal[1] = Field(default=1, alias="schema")
    kit: int
    core: str
    backend: str
    distribution: str
    version: str
    device: str = ""
    emulated: bool = False
    date: str
    hooks: Mapping[str, int] = Field(default_factory=dict)
    options: Mapping[str, object] = Field(default_factory=dict)
    selected: str = ""
    levels: Mapping[str, LevelCounts] = Field(default_factory=dict)
    worst: Mapping[str, WorstError] = Field(default_factory=dict)
    skipped: tuple[EndedCheck, ...] = ()
    failed: tuple[EndedCheck, ...] = ()

    @property
    def passed(self) -> int:
        """Checks that passed, of all levels."""
        return sum(counts.passed for counts in self.levels.values())

    @property
    def ok(self) -> bool:
        """Something was asked, and nothing failed."""
        return bool(self.passed) and not self.failed

    def in_words(self) -> str:
        """One line for a table."""
        word = "conformant" if self.ok else f"NOT conformant, {len(self.failed)} failed"
        reached = [level for level, counts in self.levels.items() if counts.passed]
        if "device" not in reached:
            word += f" as far as it was asked ({', '.join(reached) or 'nothing'})"
        emulated = ", emulated" if self.emulated else ""
        return f"{word}: kit {self.kit}, {self.passed} passed{emulated}, {self.date}"

    def to_json(self) -> str:
        """The file's text."""
        return self.model_dump_json(indent=2, by_alias=True) + "\n"


def read_verdict(path: Path) -> ConformanceVerdict:
    """Read a verdict.

    Raises:
        ConfigError: the file is missing or is no verdict.
    """
    try:
        return ConformanceVerdict.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the verdict {path} cannot be read: {error}") from error
    except ValidationError as error:
        wrong = error.errors()[0]
        place = ".".join(str(part) for part in wrong["loc"])
        raise ConfigError(
            f"{path} is no verdict of the conformance kit: {place or 'the file'}: {wrong['msg']}",
            remedy="write it with mortise conformance NAME --output FILE",
        ) from error


def shipped_verdict(row: Candidate) -> ConformanceVerdict | None:
    """The verdict that a distribution ships beside its manifest, if it does.

    Raises:
        ConfigError: its manifest names one, and it cannot be read.
    """
    if row.manifest is None or not row.manifest.conformance or row.manifest_path is None:
        return None
    return read_verdict(Path(row.manifest_path).parent / row.manifest.conformance)


def differences_of(verdict: ConformanceVerdict, row: Candidate) -> list[str]:
    """For what else than the installed distribution and kit a verdict was given."""
    found = []
    if (verdict.distribution, verdict.version) != (row.distribution, row.version):
        found.append(f"{verdict.distribution} {verdict.version}")
    if verdict.kit != KIT_VERSION:
        found.append(f"kit {verdict.kit}, this core has {KIT_VERSION}")
    if row.manifest is not None and dict(verdict.hooks) != dict(row.manifest.implements):
        found.append("other hooks")
    if verdict.selected:
        found.append(f"the checks {verdict.selected!r} alone")
    return found
