"""What the installed files of a backend say, without binding it."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Final

from mortise.backends.bind import import_backend
from mortise.backends.validate import CORE_DISTRIBUTION
from mortise.conformance.records import Check, FaultError, Level, NotAskedError
from mortise.conformance.witness import witness
from mortise.errors import MortiseError

if TYPE_CHECKING:
    from mortise.conformance.subject import Subject

LISTING: Final = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from mortise.backends.discover import discover_backends; "
    "discover_backends(); "
    "print(json.dumps([name for name in sys.modules if name.split('.')[0] == sys.argv[2]]))"
)
CORE_PACKAGE: Final = "mortise"


def the_manifest_is_accepted(subject: Subject) -> None:
    """Its manifest can be read, its name is its entry point's, and its engine range and hook
    versions fit this core.
    """
    try:
        row = subject.row
    except MortiseError as error:
        raise FaultError(str(error)) from error
    assert row.manifest is not None


def listing_imports_nothing(subject: Subject) -> None:
    """Listing the installed backends imports no module of it."""
    assert subject.row.manifest is not None
    package = _package(subject)
    if package == CORE_PACKAGE:
        raise NotAskedError("it is part of the core")
    child = subprocess.run(
        [sys.executable, "-c", LISTING, json.dumps(sys.path), package],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if child.returncode:
        raise FaultError(f"listing failed: {child.stderr.strip().splitlines()[-1:]}")
    if loaded := json.loads(child.stdout.splitlines()[-1]):
        raise FaultError(f"listing the backends imported {', '.join(loaded)}")


def _package(subject: Subject) -> str:
    manifest = subject.row.manifest
    assert manifest is not None
    assert manifest.object is not None
    return manifest.object.split(".")[0].split(":")[0]


def it_imports_without_a_device(subject: Subject) -> None:
    """Its module can be imported where there is neither device nor library of a vendor: what is
    imported in ``create`` can be told of when it is missing.
    """
    if problem := witness(subject).not_imported:
        raise FaultError(
            f"its module cannot be imported here: {problem}\n"
            "import the vendor's libraries in create, not at the top of the module"
        )


def importing_it_changes_nothing(subject: Subject) -> None:
    """Importing it replaces, adds and removes no attribute of a module or class of the core."""
    if changed := witness(subject).after_import:
        raise FaultError(f"importing it mutates the core: {'; '.join(changed)}")


def it_implements_what_it_declares(subject: Subject) -> None:
    """Its class implements the hooks of its manifest and no other, with their exact signatures."""
    try:
        import_backend(subject.row)
    except MortiseError as error:
        raise FaultError(str(error)) from error


def its_files_are_its_own(subject: Subject) -> None:
    """Its distribution writes into no package of the core or of another distribution."""
    own, others = _tops(subject.row.distribution), _tops(CORE_DISTRIBUTION)
    if subject.row.distribution == CORE_DISTRIBUTION:
        raise NotAskedError("it is part of the core")
    if own is None:
        raise NotAskedError("the distribution has no list of its files")
    if shared := own & ((others or frozenset()) | {CORE_PACKAGE}):
        raise FaultError(f"its distribution writes into {', '.join(sorted(shared))}")


def _tops(distribution: str) -> frozenset[str] | None:
    """Top-level packages of a distribution by its list of files."""
    try:
        files = importlib.metadata.files(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
    if not files:
        return None
    paths = [PurePosixPath(str(file)) for file in files]
    return frozenset(
        path.parts[0]
        for path in paths
        if len(path.parts) > 1 and not path.parts[0].endswith(".dist-info") and path.suffix == ".py"
    )


def _check(run: object) -> Check:
    return Check(run=run, level=Level.STATIC)  # type: ignore[arg-type]


CHECKS: Final = (
    _check(the_manifest_is_accepted),
    _check(listing_imports_nothing),
    _check(it_imports_without_a_device),
    _check(importing_it_changes_nothing),
    _check(it_implements_what_it_declares),
    _check(its_files_are_its_own),
)
