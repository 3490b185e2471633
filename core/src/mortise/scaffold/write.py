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
    _require_free(directory)
    unfinished = directory.with_name(f".{directory.name}.{secrets.token_hex(4)}.unfinished")
    try:
        unfinished.mkdir(parents=True)
        try:
            for path, text in texts.items():
                file = unfinished / path
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(text, encoding="utf-8", newline="\n")
            unfinished.rename(directory)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    except (OSError, ValueError) as error:
        raise NewPluginError(
            f"{str(directory)!r} cannot be written: {error}",
            expected="a place where a directory can be made",
            remedy="correct the path or its permissions; nothing half-done is left",
        ) from None


def _require_free(directory: Path) -> None:
    try:
        found = sorted(path.name for path in directory.iterdir())
    except FileNotFoundError:
        if not directory.is_symlink():
            return
        found = []
    except OSError:
        found = []
    else:
        if not found:
            return
    what = "is not empty" if found else "is there, and is no directory that can be read"
    raise NewPluginError(
        f"{str(directory)!r} {what}",
        details=[f"found: {', '.join(found[:5])}"] if found else [],
        expected="a directory that is empty or not there yet",
        remedy="give another directory with --output",
    )
