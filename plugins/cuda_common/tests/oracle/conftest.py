"""The vendor's sources, and what its schedulers answer, once for all tests here."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Final

import pytest
from plugins.cuda_common.tests.oracle.schedulers import Schedulers
from plugins.cuda_common.tests.oracle.wheel import WheelMissingError, fetch, unpack

SECONDS: Final = 120
SOURCE: Final = Path(__file__).with_name("host_schedulers.cpp")
HEADERS: Final = ("sm90_paged_mqa_logits.cuh", "sm100_paged_mqa_logits.cuh")
STOOD_IN_FOR: Final = ("common/math.cuh", "common/types.cuh", "ptx/utils.cuh")
"""Headers that the schedulers include; what they use of them is in the program instead."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--deep-gemm-wheel",
        type=Path,
        default=None,
        help="a wheel of sgl-deep-gemm, instead of downloading it",
    )


@pytest.fixture(scope="session")
def vendor(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked package ``deep_gemm``."""
    folder = tmp_path_factory.mktemp("deep_gemm")
    wheel: Path | None = request.config.getoption("--deep-gemm-wheel", default=None)
    try:
        return unpack(wheel or fetch(folder), folder)
    except WheelMissingError as error:
        pytest.skip(f"THE EMULATED DEEPGEMM WAS NOT COMPARED WITH THE VENDOR'S SOURCES: {error}")


@pytest.fixture(scope="session")
def schedulers(vendor: Path, tmp_path_factory: pytest.TempPathFactory) -> Schedulers:
    """The vendor's own schedulers of paged scores, compiled for the host."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("THE EMULATED SCHEDULE WAS NOT COMPARED WITH THE VENDOR'S: there is no g++")
    folder = tmp_path_factory.mktemp("schedulers")
    headers = folder / "deep_gemm"
    for name in STOOD_IN_FOR:
        (headers / name).parent.mkdir(parents=True, exist_ok=True)
        (headers / name).touch()
    (headers / "scheduler").mkdir()
    for name in HEADERS:
        shutil.copy(vendor / "include" / "deep_gemm" / "scheduler" / name, headers / "scheduler")
    program = folder / "schedulers"
    command = [compiler, "-std=c++20", "-O1", "-w", "-pthread", f"-I{folder}", str(SOURCE)]
    subprocess.run([*command, "-o", str(program)], check=True, timeout=SECONDS)
    return Schedulers(program)
