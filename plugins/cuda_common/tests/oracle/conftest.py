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
HERE: Final = Path(__file__).parent


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
    own = ("scheduler/sm90_paged_mqa_logits.cuh", "scheduler/sm100_paged_mqa_logits.cuh")
    stood_in_for = ("deep_gemm/common/types.cuh", "deep_gemm/ptx/utils.cuh")
    return Schedulers(compiled(vendor, tmp_path_factory, "host_schedulers.cpp", own, stood_in_for))


@pytest.fixture(scope="session")
def group_program(vendor: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The vendor's own scheduler of grouped products, compiled for the host."""
    own = ("scheduler/gemm.cuh", "common/types.cuh")
    stood_in_for = ("cute/arch/mma_sm100_desc.hpp",)
    return compiled(vendor, tmp_path_factory, "host_groups.cpp", own, stood_in_for)


def compiled(
    vendor: Path,
    tmp_path_factory: pytest.TempPathFactory,
    source: str,
    own: tuple[str, ...],
    stood_in_for: tuple[str, ...],
) -> Path:
    """Compile a program here with some of the vendor's headers.

    Args:
        vendor: the package.
        tmp_path_factory: where to.
        source: of the program.
        own: headers that are the vendor's.
        stood_in_for: headers that those include, and what they hold is in the program instead.
    """
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("THE EMULATED DEEPGEMM WAS NOT COMPARED WITH THE VENDOR'S: there is no g++")
    folder = tmp_path_factory.mktemp("program")
    for name in ("deep_gemm/common/math.cuh", *stood_in_for):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    for name in own:
        (folder / "deep_gemm" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(vendor / "include" / "deep_gemm" / name, folder / "deep_gemm" / name)
    program = folder / "program"
    command = [compiler, "-std=c++20", "-O1", "-w", "-pthread", f"-I{folder}", str(HERE / source)]
    subprocess.run([*command, "-o", str(program)], check=True, timeout=SECONDS)
    return program
