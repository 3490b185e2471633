"""Run the kit in a process of its own and put what it found into a verdict."""

from __future__ import annotations

import datetime as dt
import json
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from mortise.backends.discover import engine_version
from mortise.backends.verdict import (
    KIT_VERSION,
    ConformanceVerdict,
    EndedCheck,
    LevelCounts,
    WorstError,
)
from mortise.conformance.records import Level
from mortise.errors import BackendUnusableError, ConfigError
from mortise.spec.reasons import ReasonCode

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mortise.conformance.subject import Subject

# pytest writes a variable of its process, a backend may crash, and threads are set: all of that
# stays in a child, which searches the paths that the parent searches.
PROGRAM: Final = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from mortise.conformance.child import run; run(*sys.argv[2:])"
)


def run_conformance(
    subject: Subject, levels: Sequence[Level] = tuple(Level), keyword: str = ""
) -> ConformanceVerdict:
    """Ask every check of some levels.

    Args:
        subject: the backend.
        levels: what to ask.
        keyword: an expression of pytest's ``-k``; empty asks everything.

    Raises:
        BackendError: no such backend is installed, or asking it ended the process.
        ConfigError: the expression is none, or matches nothing.
    """
    row = subject.row
    request = {
        "backend": subject.name,
        "device": subject.device,
        "options": dict(subject.options),
        "levels": [level.value for level in levels],
        "keyword": keyword,
    }
    found = _in_child(request, f"backend {row.name!r} of {row.provenance}")
    if found["is_usage_error"]:
        raise ConfigError(
            f"{keyword!r} is no expression of pytest's -k", expected="for example: experts and fp8"
        )
    if not found["ended"]:
        raise ConfigError(
            f"no check matches {keyword!r}",
            expected="a part of a check's name, or an expression of pytest's -k",
        )
    return _verdict(subject, found, keyword)


def _in_child(request: Mapping[str, Any], whose: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="mortise-conformance-") as folder:
        answer = Path(folder, "answer.json")
        child = subprocess.run(
            [sys.executable, "-c", PROGRAM, json.dumps(sys.path), json.dumps(request), answer],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        if answer.exists():
            found: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
            return found
    raise BackendUnusableError(
        f"the process that asked it ended with {_how(child.returncode)}",
        reason=ReasonCode.PROBE_CRASHED,
        details=[*child.stderr.strip().splitlines()[-5:], whose],
        remedy="ask less with --level or -k to find what ends it",
    )


def _how(returncode: int) -> str:
    try:
        return f"signal {signal.Signals(-returncode).name}"
    except ValueError:
        return f"exit code {returncode}"


def _verdict(subject: Subject, found: Mapping[str, Any], keyword: str) -> ConformanceVerdict:
    row, ended = subject.row, found["ended"]
    return ConformanceVerdict(
        kit=KIT_VERSION,
        core=engine_version(),
        backend=row.name,
        distribution=row.distribution,
        version=row.version,
        device=found["device"],
        emulated=found["emulated"],
        date=dt.datetime.now(dt.UTC).date().isoformat(),
        hooks=dict(subject.hooks),
        options=dict(subject.options),
        selected=keyword,
        levels=_counts(ended),
        worst=_worst(ended),
        skipped=_listed(ended, "skipped"),
        failed=_listed(ended, "failed"),
    )


def _outcome(one: dict[str, Any]) -> str:
    return next((word for word in ("failed", "skipped") if word in one), "passed")


def _counts(ended: list[dict[str, Any]]) -> dict[str, LevelCounts]:
    counted = Counter((one["level"], _outcome(one)) for one in ended)
    return {
        level.value: LevelCounts(
            passed=counted[level, "passed"],
            failed=counted[level, "failed"],
            skipped=counted[level, "skipped"],
        )
        for level in Level
        if any(found == level for found, _ in counted)
    }


def _worst(ended: list[dict[str, Any]]) -> dict[str, WorstError]:
    worst: dict[str, WorstError] = {}
    for one in ended:
        if "measured" not in one:
            continue
        subject, error, tolerance = one["measured"]
        known = worst.get(subject)
        found = WorstError(error=error, tolerance=tolerance)
        # Of equally good ones, the one that asked for more.
        if known is None or _badness(found) > _badness(known):
            worst[subject] = found
    return dict(sorted(worst.items()))


def _badness(one: WorstError) -> tuple[float, float]:
    return one.error / one.tolerance, -one.tolerance


def _listed(ended: list[dict[str, Any]], word: str) -> tuple[EndedCheck, ...]:
    return tuple(EndedCheck(check=one["check"], reason=one[word]) for one in ended if word in one)
