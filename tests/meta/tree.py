"""Where the sources are, for tests that read them instead of running them."""

from __future__ import annotations

import ast
import subprocess
from functools import cache
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
CORE_SOURCES = REPOSITORY / "core" / "src"
PLUGIN_SOURCES = tuple(sorted(REPOSITORY.glob("plugins/*/src")))
SOURCE_ROOTS = (CORE_SOURCES, *PLUGIN_SOURCES)


@cache
def python_files(*roots: Path) -> tuple[Path, ...]:
    """Every Python file below the given roots (default: core and plugins), in a stable order."""
    return tuple(sorted(path for root in roots or SOURCE_ROOTS for path in root.rglob("*.py")))


@cache
def syntax_tree(path: Path) -> ast.Module:
    """The parsed source of one file."""
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def module_name(path: Path) -> str:
    """The dotted name that a source file is imported by."""
    root = next(root for root in SOURCE_ROOTS if path.is_relative_to(root))
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def shown(path: Path) -> str:
    """A path as a reader of the repository writes it."""
    return path.relative_to(REPOSITORY).as_posix()


@cache
def tracked_files() -> tuple[Path, ...]:
    """Every file that git tracks and that is there."""
    listing = subprocess.run(
        ["git", "ls-files", "-z"], cwd=REPOSITORY, check=True, capture_output=True, text=True
    ).stdout
    paths = (REPOSITORY / name for name in listing.split("\0") if name)
    return tuple(path for path in paths if path.is_file())
