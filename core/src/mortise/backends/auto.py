"""Choose a backend by looking for devices, for ``backend = "auto"``."""

from __future__ import annotations

import fnmatch
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from mortise.backends.candidate import Candidate, Stage, replace_row
from mortise.backends.probe import ProbeOutcome, probe_in_child
from mortise.backends.select import (
    Selection,
    SelectionRule,
    mark_others,
    table_lines,
    unusable,
)
from mortise.backends.validate import REFERENCE
from mortise.errors import BackendConflictError, BackendNotFoundError
from mortise.spec.reasons import ReasonCode

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mortise.backends.manifest import Manifest

BROKEN: Final = frozenset(
    {ReasonCode.PROBE_CRASHED, ReasonCode.PROBE_TIMEOUT, ReasonCode.IMPORT_FAILED}
)


def select_auto(
    candidates: Sequence[Candidate], probe: Callable[[str], ProbeOutcome] = probe_in_child
) -> Selection:
    """Probe the usable backends, each in a child process, and take the one that fits most closely.

    An architecture named exactly goes before a pattern, a pattern before none. The reference is
    taken only if no other backend serves and none of them is broken: a backend whose probe
    crashed, hung or failed to import is news for its owner, never a reason to run slowly.

    Args:
        candidates: the rows of ``discover_backends``.
        probe: asks the class ``package.module:Class`` whether its device is here.

    Raises:
        BackendConflictError: several backends fit equally well.
        BackendUnusableError: no other backend serves, and one is broken.
        BackendNotFoundError: nothing serves at all.
    """
    probed = [_probed(row, probe) for row in candidates]
    rows = [row for row, _ in probed]
    serving = [(row, fit) for row, fit in probed if row.stage is Stage.DEVICE_SEEN]
    if not serving:
        return _reference(rows)
    closest = max(fit for _, fit in serving)
    best = [row for row, fit in serving if fit == closest]
    if len(best) > 1:
        raise _tie(best, rows)
    return _chosen(rows, best[0], SelectionRule.AUTO, best[0].explanation)


def probe_backends(
    candidates: Sequence[Candidate], probe: Callable[[str], ProbeOutcome] = probe_in_child
) -> tuple[Candidate, ...]:
    """The rows as they are once each usable backend was asked for its device, in a child process.

    Args:
        candidates: the rows of ``discover_backends``.
        probe: asks the class ``package.module:Class`` whether its device is here.
    """
    return tuple(_probed(row, probe)[0] for row in candidates)


def _probed(row: Candidate, probe: Callable[[str], ProbeOutcome]) -> tuple[Candidate, int]:
    """The row as its probe left it, and how closely it fits: 2 exact, 1 pattern, 0 otherwise."""
    manifest = row.manifest
    # Namesakes take part, so that two of them end in a tie.
    considered = row.usable or row.reason is ReasonCode.NAME_DUPLICATE
    if manifest is None or manifest.object is None or not considered or row.name == REFERENCE:
        return row, 0
    if manifest.devices and not any(map(_exists, manifest.devices)):
        nodes = ", ".join(manifest.devices)
        remedy = "load the driver, and hand the device to this container"
        return row.rejected(ReasonCode.DEVICE_ABSENT, f"no device node like {nodes}", remedy), 0
    outcome = probe(manifest.object)
    if outcome.reason is not None:
        return row.rejected(outcome.reason, outcome.explanation, outcome.remedy), 0
    fit = _fit(manifest, outcome.arch)
    if fit is None:
        wanted = ", ".join(manifest.arch)
        explanation = f"made for {wanted}, found {outcome.arch or 'no architecture'}"
        remedy = "use a backend that is made for it"
        return row.rejected(ReasonCode.ARCH_MISMATCH, explanation, remedy), 0
    seen = replace(
        row, stage=Stage.DEVICE_SEEN, reason=None, explanation=outcome.explanation, remedy=""
    )
    return seen, fit


def _exists(pattern: str) -> bool:
    path = Path(pattern)
    return any(Path(path.anchor).glob(str(path.relative_to(path.anchor))))


def _fit(manifest: Manifest, arch: str) -> int | None:
    if not manifest.arch:
        return 0
    if arch in manifest.arch:
        return 2
    return 1 if any(fnmatch.fnmatchcase(arch, pattern) for pattern in manifest.arch) else None


def _chosen(
    rows: Sequence[Candidate], row: Candidate, rule: SelectionRule, reason: str
) -> Selection:
    chosen = replace(
        row, stage=Stage.SELECTED, reason=ReasonCode.SELECTED, explanation=reason, remedy=""
    )
    return Selection(
        row=chosen,
        candidates=mark_others(replace_row(rows, row, chosen)),
        rule=rule,
        reason=reason,
    )


def _reference(rows: Sequence[Candidate]) -> Selection:
    broken = next((row for row in rows if row.reason in BROKEN), None)
    if broken is not None:
        raise unusable(broken, rows)
    reference = next((row for row in rows if row.name == REFERENCE and row.usable), None)
    if reference is None:
        raise BackendNotFoundError(
            "no installed backend serves this machine",
            reason=ReasonCode.NOT_FOUND,
            details=table_lines(rows),
            remedy="install a backend for its device, or reinstall the core",
        )
    others = "; ".join(f"{row.name}: {row.explanation}" for row in rows if row is not reference)
    reason = f"no other backend serves ({others or 'none is installed'})"
    return _chosen(rows, reference, SelectionRule.REFERENCE_LAST, reason)


def _tie(best: Sequence[Candidate], rows: Sequence[Candidate]) -> BackendConflictError:
    return BackendConflictError(
        f"{len(best)} backends fit this machine equally well",
        reason=ReasonCode.AMBIGUOUS,
        details=[*(f"{row.name}: {row.provenance}" for row in best), *table_lines(rows)],
        expected="one backend that fits best",
        remedy="configure one of them by name: "
        + ", ".join(
            f"{row.distribution}:{row.name}"
            if [other.name for other in best].count(row.name) > 1
            else row.name
            for row in best
        ),
    )
