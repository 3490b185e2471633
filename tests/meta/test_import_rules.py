"""Imports run one way; the rules themselves are in the root ``pyproject.toml``."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

from tests.meta.tree import CORE_SOURCES, REPOSITORY

if TYPE_CHECKING:
    from pathlib import Path

PROGRAM = """
import sys
from importlinter.cli import lint_imports
sys.exit(lint_imports(sys.argv[1], no_cache=True))
"""


def lint_imports(sources: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, str(REPOSITORY / "pyproject.toml")],
        cwd=sources,
        env={**os.environ, "PYTHONPATH": str(sources)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_imports_run_downward() -> None:
    outcome = lint_imports(CORE_SOURCES)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr


def test_an_upward_import_is_found(tmp_path: Path) -> None:
    shutil.copytree(
        CORE_SOURCES / "mortise",
        tmp_path / "mortise",
        ignore=shutil.ignore_patterns("assets", "__pycache__"),
    )
    errors = tmp_path / "mortise" / "errors.py"
    errors.write_text(
        errors.read_text(encoding="utf-8") + "\nimport mortise.spec.roles\n", encoding="utf-8"
    )

    outcome = lint_imports(tmp_path)

    assert outcome.returncode == 1, outcome.stdout + outcome.stderr
    assert "mortise.errors is not allowed to import mortise.spec" in outcome.stdout
