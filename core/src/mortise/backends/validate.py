"""Check each manifest against this core: names, engine range, hooks and their versions."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Final, NamedTuple

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from mortise.backends.adapters import adapter_of
from mortise.backends.candidate import Candidate, Stage
from mortise.spec.hooks import HOOKS, PAIRED_HOOKS
from mortise.spec.reasons import ReasonCode

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from mortise.backends.manifest import Manifest

CORE_DISTRIBUTION: Final = "mortise-core"
REFERENCE: Final = "reference"
AUTO: Final = "auto"
RESERVED_NAMES: Final = frozenset({AUTO, REFERENCE, "none"})
NAME: Final = re.compile(r"[a-z][a-z0-9_]*")


class Rejection(NamedTuple):
    """Why a row stops here."""

    reason: ReasonCode
    explanation: str
    remedy: str


def validate(candidates: Iterable[Candidate], engine_version: str) -> tuple[Candidate, ...]:
    """Take each row one stage further, or say what stopped it; then mark names claimed twice."""
    return _mark_duplicates([_validated(row, engine_version) for row in candidates])


def is_squatter(row: Candidate) -> bool:
    """Whether a distribution other than the core claims a name that the core keeps for itself."""
    return row.name in RESERVED_NAMES and row.distribution != CORE_DISTRIBUTION


def _validated(row: Candidate, engine_version: str) -> Candidate:
    if row.manifest is None:
        return row
    rejection = (
        _check_names(row, row.manifest)
        or _check_engine(row.manifest, engine_version)
        or _check_hooks(row.manifest)
        or _check_pairs(row.manifest)
    )
    if rejection is not None:
        return row.rejected(*rejection)
    row = replace(row, stage=Stage.COMPATIBLE)
    if row.manifest is not None and row.manifest.status == "planned":
        return row.rejected(
            ReasonCode.CANNOT_SERVE_YET,
            row.manifest.status_reason,
            f"use another backend, or a later {row.distribution}",
        )
    return row


def _check_names(row: Candidate, manifest: Manifest) -> Rejection | None:
    if not NAME.fullmatch(row.name):
        return Rejection(
            ReasonCode.MANIFEST_INVALID,
            f"the name {row.name!r} is not lower-case letters, digits and underscores",
            f"rename the entry point to match {NAME.pattern}",
        )
    if is_squatter(row):
        return Rejection(
            ReasonCode.MANIFEST_INVALID,
            f"the name {row.name!r} is reserved",
            f"rename the backend of {row.distribution}",
        )
    if manifest.name != row.name:
        return Rejection(
            ReasonCode.MANIFEST_INVALID,
            f"its entry point is named {row.name!r}, its manifest {manifest.name!r}",
            "give both the same name",
        )
    return None


def _check_engine(manifest: Manifest, engine_version: str) -> Rejection | None:
    # A local version (1.2+build) says how the core was built, not what it can do.
    public = Version(engine_version).public
    if SpecifierSet(manifest.engine).contains(public, prereleases=True):
        return None
    return Rejection(
        ReasonCode.ENGINE_INCOMPATIBLE,
        f"it needs {CORE_DISTRIBUTION} {manifest.engine}, installed is {engine_version}",
        f"install a matching {CORE_DISTRIBUTION}, or a version of the backend made for {public}",
    )


def _check_hooks(manifest: Manifest) -> Rejection | None:
    for name, version in manifest.implements.items():
        spec = HOOKS.get(name)
        if spec is None:
            return Rejection(
                ReasonCode.HOOK_UNKNOWN,
                f"it implements {name!r}, which is no hook{similar_hook(name)}",
                f"hooks are {', '.join(HOOKS)}",
            )
        if spec.version != version and adapter_of(name, version) is None:
            newer = version > spec.version
            return Rejection(
                ReasonCode.HOOK_VERSION_UNSUPPORTED,
                f"it implements version {version} of hook {name}, this core has {spec.version}",
                "install a newer core" if newer else "install a newer version of the backend",
            )
    return None


def similar_hook(name: str) -> str:
    """``, did you mean 'qkv_split'?`` for a misspelt hook, or nothing."""
    close = difflib.get_close_matches(name, HOOKS, n=1)
    return f", did you mean {close[0]!r}?" if close else ""


def _check_pairs(manifest: Manifest) -> Rejection | None:
    for pair in PAIRED_HOOKS:
        missing = sorted(pair - manifest.implements.keys())
        if missing and len(missing) < len(pair):
            given = ", ".join(sorted(pair & manifest.implements.keys()))
            return Rejection(
                ReasonCode.MANIFEST_INVALID,
                f"it implements {given} without {', '.join(missing)}, which reads the same record",
                f"implement all of {', '.join(sorted(pair))}, or none",
            )
    return None


def _mark_duplicates(rows: Sequence[Candidate]) -> tuple[Candidate, ...]:
    counts = Counter(row.name for row in rows if not is_squatter(row))
    return tuple(
        row.rejected(
            ReasonCode.NAME_DUPLICATE,
            "claimed also by "
            + ", ".join(
                other.provenance for other in rows if other.name == row.name and other is not row
            ),
            f"uninstall one of them, or write {row.distribution}:{row.name}",
        )
        if row.usable and counts[row.name] > 1 and not is_squatter(row)
        else row
        for row in rows
    )
