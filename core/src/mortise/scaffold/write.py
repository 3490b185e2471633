"""A directory of text files that appears whole or not at all."""

from __future__ import annotations

import secrets
import shutil
from typing import TYPE_CHECKING

from mortise.errors import NewPluginError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path, PurePosixPath


def write_whole(directory: Path, texts: Mapping[PurePosixPath, str]) -> None:
    """Write files into a directory that is not there yet, or is empty.

    Args:
        directory: where to; its parents are made.
        texts: text of each file, by its path below the directory.

    Raises:
        NewPluginError: the directory is taken, or cannot be written; nothing half-done is left.
    """
    try:
        _require_free(directory)
        _write(directory, texts)
    except (OSError, ValueError) as error:
        raise NewPluginError(
            f"{str(directory)!r} cannot be written: {error}",
            expected="a place where a directory can be made",
            remedy="correct the path or its permissions; nothing half-done is left",
        ) from None


def _write(directory: Path, texts: Mapping[PurePosixPath, str]) -> None:
    mark = f"{secrets.token_hex(4)}.unfinished"
    # An empty directory stays the one it is: somebody may be standing in it.
    is_there = directory.is_dir()
    staging = (
        directory / f".{mark}" if is_there else directory.with_name(f".{directory.name}.{mark}")
    )
    staging.mkdir(parents=True)
    try:
        for path, text in texts.items():
            file = staging / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8", newline="\n")
        if is_there:
            _move_up(staging)
        else:
            staging.rename(directory)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _move_up(staging: Path) -> None:
    """Move everything in a directory into the one above it, or nothing."""
    moved: list[tuple[Path, Path]] = []
    try:
        for child in sorted(staging.iterdir()):
            place = staging.parent / child.name
            child.rename(place)
            moved.append((place, child))
    except OSError:
        for place, child in moved:
            place.rename(child)
        raise


def _require_free(directory: Path) -> None:
    if not directory.exists() and not directory.is_symlink():
        return
    if not directory.is_dir():
        raise _taken(directory, "is there, and is no directory")
    if found := sorted(path.name for path in directory.iterdir()):
        raise _taken(directory, "is not empty", f"found: {', '.join(found[:5])}")


def _taken(directory: Path, what: str, *details: str) -> NewPluginError:
    return NewPluginError(
        f"{str(directory)!r} {what}",
        details=details,
        expected="a directory that is empty or not there yet",
        remedy="give another directory with --output",
    )
