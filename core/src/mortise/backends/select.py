"""Choose the backend that a configuration names, or explain why it cannot be had."""

from __future__ import annotations

import difflib
import sys
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING

from packaging.utils import canonicalize_name

from mortise.backends.candidate import Candidate, Stage, decision_table, replace_row
from mortise.backends.validate import AUTO, is_squatter
from mortise.errors import BackendConflictError, BackendNotFoundError, BackendUnusableError
from mortise.spec.reasons import ReasonCode

if TYPE_CHECKING:
    from collections.abc import Sequence


class SelectionRule(StrEnum):
    """How a backend came to be chosen."""

    NAMED = "named"
    """The configuration names it."""
    AUTO = "auto"
    """Its device is here, and no other backend fits as closely."""
    REFERENCE_LAST = "reference_last"
    """``auto`` found no other backend that serves."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """The chosen row, the whole table as it stood then, and why this row."""

    row: Candidate
    candidates: tuple[Candidate, ...]
    rule: SelectionRule
    reason: str


def select_by_name(candidates: Sequence[Candidate], name: str) -> Selection:
    """Take the row of that name, or of ``distribution:name``; nothing else will do.

    Raises:
        BackendNotFoundError: nothing of that name is installed.
        BackendConflictError: several distributions claim it.
        BackendUnusableError: it is installed and cannot serve; the reason is the row's.
    """
    distribution, _, plain = name.rpartition(":")
    named = [row for row in candidates if row.name == plain]
    if distribution:
        wanted = canonicalize_name(distribution)
        named = [row for row in named if row.distribution == wanted]
    # Nobody can make a name that the core keeps for itself ambiguous.
    rows = [row for row in named if not is_squatter(row)] or named
    if not rows:
        raise _not_found(candidates, name)
    if len(rows) > 1:
        raise _conflict(rows, plain)
    return _take(candidates, rows[0])


def _take(candidates: Sequence[Candidate], row: Candidate) -> Selection:
    # A row that got here has been told apart from its namesakes.
    if not row.usable and row.reason is not ReasonCode.NAME_DUPLICATE:
        raise unusable(row, candidates)
    chosen = replace(
        row, stage=Stage.SELECTED, reason=ReasonCode.SELECTED, explanation="named", remedy=""
    )
    return Selection(
        row=chosen,
        candidates=mark_others(replace_row(candidates, row, chosen)),
        rule=SelectionRule.NAMED,
        reason=f"named {row.name}",
    )


def mark_others(candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """Say of every other usable row that it was not selected."""
    return tuple(
        row.rejected(ReasonCode.NOT_SELECTED, "another backend was selected") if row.usable else row
        for row in candidates
    )


def unusable(row: Candidate, candidates: Sequence[Candidate]) -> BackendUnusableError:
    """The error for a row that was asked for and has something against it."""
    assert row.reason is not None
    return BackendUnusableError(
        f"backend {row.name!r} cannot serve: {row.explanation}",
        reason=row.reason,
        details=[f"found: {row.provenance}", *row.notes, *table_lines(candidates)],
        remedy=row.remedy or None,
    )


def table_lines(candidates: Sequence[Candidate]) -> list[str]:
    """The decision table as details of an error."""
    return ["installed backends:", *(f"  {line}" for line in decision_table(candidates))]


def _not_found(candidates: Sequence[Candidate], name: str) -> BackendNotFoundError:
    names = sorted({row.name for row in candidates})
    close = difflib.get_close_matches(name.rpartition(":")[2], [*names, AUTO], n=3)
    return BackendNotFoundError(
        f"no backend {name!r} is installed",
        reason=ReasonCode.NOT_FOUND,
        details=[f"searched: {sys.prefix}", *table_lines(candidates)],
        expected=f"one of {', '.join([*names, AUTO])}",
        remedy=f"did you mean {' or '.join(map(repr, close))}?"
        if close
        else "install the distribution that brings it, into the same Python",
    )


def _conflict(rows: Sequence[Candidate], name: str) -> BackendConflictError:
    return BackendConflictError(
        f"{len(rows)} distributions claim the backend name {name!r}",
        reason=ReasonCode.NAME_DUPLICATE,
        details=[row.provenance for row in rows],
        expected="one distribution for each name",
        remedy="uninstall all but one, or configure "
        + " or ".join(repr(f"{row.distribution}:{row.name}") for row in rows),
    )
