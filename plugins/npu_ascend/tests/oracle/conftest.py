"""The vendor's wheel, and its verdict on the emulator, once for all tests here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import pytest
from plugins.npu_ascend.tests.oracle.wheel import WheelMissingError, fetch

REPOSITORY: Final = Path(__file__).parents[4]
SECONDS: Final = 120


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--torch-npu-wheel",
        type=Path,
        default=None,
        help="a wheel of torch-npu for the installed torch, instead of downloading it",
    )


@pytest.fixture(scope="session")
def wheel(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    given: Path | None = request.config.getoption("--torch-npu-wheel", default=None)
    if given is not None:
        return given
    try:
        return fetch(tmp_path_factory.mktemp("wheel"))
    except WheelMissingError as error:
        pytest.skip(f"THE EMULATOR WAS NOT COMPARED WITH THE VENDOR'S OPERATORS: {error}")


@pytest.fixture(scope="session")
def verdict(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What ``judge.py`` found, in a process whose operators no other test sees."""
    written = tmp_path_factory.mktemp("verdict") / "verdict.json"
    outcome = subprocess.run(
        [sys.executable, "-m", "plugins.npu_ascend.tests.oracle.judge", str(wheel), str(written)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    if outcome.returncode != 0:
        pytest.fail(f"the judge did not come to a verdict:\n{outcome.stderr}", pytrace=False)
    found: dict[str, Any] = json.loads(written.read_text(encoding="utf-8"))
    return found
