"""What ``mortise new-plugin`` writes is as good as our own code: style, types, its own test."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from mortise.scaffold import PluginPlan, plan_plugin, render_plugin, write_whole
from mortise.scaffold.plan import MAX_NAME

REPOSITORY = Path(__file__).resolve().parents[3]
# The longest name, whose lines are the longest; and vendors who try to get out of their quotes.
PLANS = (
    PluginPlan(name="my_chip", vendor='"Acme" \\ """Sons"""'),
    PluginPlan(name="x"),
    PluginPlan(name="m" * MAX_NAME, vendor="v" * 80),
)


@pytest.fixture(params=PLANS, ids=lambda plan: plan.name)
def written(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    plan: PluginPlan = request.param
    plan_plugin(plan.name, vendor=plan.vendor)
    write_whole(tmp_path / "new", render_plugin(plan))
    return tmp_path / "new"


def run(directory: Path, *arguments: str | Path) -> str:
    """Run a tool in the directory as its author would after installing it."""
    child = subprocess.run(
        [sys.executable, "-m", *map(str, arguments)],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": "src", "MYPYPATH": "src", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stdout + child.stderr
    return child.stdout


def settings(project: Path) -> dict:
    return tomllib.loads((project / "pyproject.toml").read_text(encoding="utf-8"))["tool"]


def test_its_style_is_clean(written: Path) -> None:
    run(written, "ruff", "check", "--no-cache", ".")
    run(written, "ruff", "format", "--no-cache", "--check", ".")


def test_its_style_is_ours(written: Path) -> None:
    theirs, ours = settings(written)["ruff"], settings(REPOSITORY)["ruff"]
    assert theirs["lint"]["select"] == ours["lint"]["select"]
    assert set(theirs["lint"]["ignore"]) <= set(ours["lint"]["ignore"])
    assert theirs["line-length"] == ours["line-length"]
    assert settings(written)["mypy"]["strict"] is settings(REPOSITORY)["mypy"]["strict"] is True


def test_its_own_test_passes(written: Path) -> None:
    assert "6 passed" in run(
        written, "pytest", "-q", "-p", "no:cacheprovider", "tests/test_split.py"
    )


def test_its_types_are_strict(tmp_path: Path) -> None:
    """One plan suffices: names change no type."""
    write_whole(tmp_path / "new", render_plugin(PLANS[0]))
    run(tmp_path / "new", "mypy", "--cache-dir", tmp_path / "cache")


def test_it_requires_of_torch_what_the_core_requires(written: Path) -> None:
    def required(project: Path) -> set[str]:
        text = (project / "pyproject.toml").read_text(encoding="utf-8")
        return set(tomllib.loads(text)["project"]["dependencies"])

    assert required(written) - required(REPOSITORY / "core") == {"mortise-core>=0.1"}
