"""Wheels of the distributions, and an environment that holds nothing else of Mortise."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

REPOSITORY = Path(__file__).resolve().parents[2]
PROJECTS = (
    REPOSITORY / "core",
    *sorted(path.parent for path in REPOSITORY.glob("plugins/*/pyproject.toml")),
)
TOY = REPOSITORY / "docs" / "examples" / "toy_backend"


def variables() -> dict[str, str]:
    """The environment of a child: nothing that would bring this checkout, or settings, along."""
    left_out = ("MORTISE_", "PYTHONPATH", "PYTEST_")
    kept = {name: text for name, text in os.environ.items() if not name.startswith(left_out)}
    return {**kept, "OMP_NUM_THREADS": "1"}


def run(
    *arguments: str | Path, cwd: Path | None = None, code: int = 0
) -> subprocess.CompletedProcess[str]:
    """Run a command that must end with this exit code."""
    child = subprocess.run(
        list(map(str, arguments)),
        cwd=cwd,
        env=variables(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == code, f"{arguments}\n{child.stdout}{child.stderr}"
    return child


def pip(*arguments: str | Path, python: Path | None = None) -> str:
    """Run pip, for this Python or for another one that has none."""
    target = () if python is None else ("--python", python)
    command = (sys.executable, "-m", "pip", "--disable-pip-version-check", "-q")
    return run(*command, *target, *arguments).stdout


def build_wheels(projects: Iterable[Path], directory: Path) -> dict[str, Path]:
    """The wheel of each project, by the name of its distribution with underscores."""
    pip("wheel", "--no-deps", "--wheel-dir", directory, *projects)
    return {path.name.split("-")[0]: path for path in directory.glob("*.whl")}


class CleanEnvironment:
    """A virtual environment that shares the libraries of this one, and no distribution of Mortise.

    Every library is a link to the installed one: nothing is downloaded, and an installer sees which
    versions are there.

    Args:
        directory: where to make it.
    """

    def __init__(self, directory: Path) -> None:
        run(sys.executable, "-m", "venv", "--without-pip", directory)
        self.directory = directory
        self.python = directory / "bin" / "python"
        self.packages = Path(
            sysconfig.get_path("purelib", vars={"base": str(directory)}, scheme="venv")
        )
        libraries = directory / "libraries"
        libraries.mkdir()
        for library in self._libraries():
            (libraries / library.name).symlink_to(library)
        (self.packages / "libraries.pth").write_text(f"{libraries}\n", encoding="utf-8")

    def _libraries(self) -> list[Path]:
        # Files that end in .pth bring editable distributions, Mortise's among them.
        ours = ("mortise", "_editable_impl", "__editable__", "__pycache__")
        places = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
        return [
            path
            for place in sorted(places)
            for path in Path(place).iterdir()
            if not path.name.startswith(ours) and path.suffix != ".pth"
        ]

    def install(self, wheels: Iterable[Path]) -> None:
        """Install wheels from their files; whatever they require must be here or among them."""
        pip("install", "--no-index", "--no-build-isolation", *wheels, python=self.python)

    def mortise(self, *arguments: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
        """Run the installed command in a directory without anything."""
        empty = self.directory / "empty"
        empty.mkdir(exist_ok=True)
        return run(self.directory / "bin" / "mortise", *arguments, cwd=empty, code=code)
