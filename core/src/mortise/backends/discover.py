"""Find installed backends by their metadata and manifests, importing none of their code."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from packaging.utils import canonicalize_name

from mortise.backends.candidate import Candidate, Stage
from mortise.backends.manifest import parse_manifest
from mortise.backends.validate import CORE_DISTRIBUTION, validate
from mortise.errors import BackendUnusableError
from mortise.spec.reasons import ReasonCode

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from importlib.metadata import Distribution, EntryPoint

GROUP: Final = "mortise.backends"
ENTRY_VALUE: Final = re.compile(
    r"(?P<package>[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):(?P<file>[\w-]+\.toml)"
)


def engine_version() -> str:
    """Version of the installed core."""
    return importlib.metadata.version(CORE_DISTRIBUTION)


def discover_backends() -> tuple[Candidate, ...]:
    """List every installed backend with the stage it reached; no plugin is imported.

    Returns:
        One row for each entry point of the group ``mortise.backends``, sorted by name. A row that
        cannot be used says why; it never hides the others.
    """
    rows = (row for found in importlib.metadata.distributions() for row in _rows_of(found))
    return validate(_without_copies(rows), engine_version())


def _rows_of(distribution: Distribution) -> Iterator[Candidate]:
    text = distribution.read_text("entry_points.txt")
    if not text or GROUP not in text:
        return
    try:
        entries = distribution.entry_points.select(group=GROUP)
    except Exception as error:  # whatever one broken file raises, the others are listed
        row = _row(distribution, _name(distribution), "")
        yield row.rejected(
            ReasonCode.MANIFEST_INVALID,
            f"its entry_points.txt cannot be read: {error}",
            f"reinstall {row.distribution}",
        )
        return
    for entry in entries:
        yield _read(distribution, entry)


def _name(distribution: Distribution) -> str:
    return canonicalize_name(_metadata(distribution, "Name", "nameless"))


def _metadata(distribution: Distribution, field: str, default: str) -> str:
    found = distribution.metadata.get_all(field)
    return str(found[0]) if found else default


def _row(distribution: Distribution, name: str, entry: str) -> Candidate:
    return Candidate(
        name=name,
        distribution=_name(distribution),
        version=_metadata(distribution, "Version", "unknown"),
        location=str(distribution.locate_file("")),
        entry=entry,
    )


def _read(distribution: Distribution, entry: EntryPoint) -> Candidate:
    row = _row(distribution, entry.name, entry.value)
    match = ENTRY_VALUE.fullmatch(entry.value)
    if match is None:
        return row.rejected(
            ReasonCode.MANIFEST_INVALID,
            f"its entry point is {entry.value!r}, which names no manifest",
            'write the entry point as name = "package:backend.toml"',
        )
    path = _find(distribution, match["package"], match["file"])
    if path is None:
        return row.rejected(
            ReasonCode.MANIFEST_INVALID,
            f"no file {match['file']} in package {match['package']}",
            f"ship {match['file']} as package data, or reinstall {row.distribution}",
        )
    row = replace(row, manifest_path=str(path))
    try:
        manifest = parse_manifest(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        return row.rejected(ReasonCode.MANIFEST_INVALID, f"the manifest cannot be read: {error}")
    except BackendUnusableError as error:
        return row.rejected(error.reason, error.what, error.remedy or "")
    return replace(row, manifest=manifest, stage=Stage.READ)


def _find(distribution: Distribution, package: str, file: str) -> Path | None:
    """The manifest beside the metadata (wheels), or where an import would look (editable)."""
    top, *inner = package.split(".")
    beside = Path(str(distribution.locate_file("")), top, *inner, file)
    if beside.is_file():
        return beside
    try:
        # Only a top-level name: to find a nested one would import its parents.
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return None
    roots = spec.submodule_search_locations if spec is not None else None
    paths = (Path(root, *inner, file) for root in roots or ())
    return next((path for path in paths if path.is_file()), None)


def _without_copies(rows: Iterable[Candidate]) -> list[Candidate]:
    """Collapse one distribution found twice, as editable installs leave it; the first counts."""
    kept: dict[tuple[str, str, str], Candidate] = {}
    for row in rows:
        key = (row.distribution, row.name, row.entry)
        first = kept.setdefault(key, row)
        if first is not row and (first.location, first.version) != (row.location, row.version):
            note = f"also found as version {row.version} in {row.location}; the first one counts"
            kept[key] = replace(first, notes=(*first.notes, note))
    return sorted(kept.values(), key=lambda row: (row.name, row.distribution))
