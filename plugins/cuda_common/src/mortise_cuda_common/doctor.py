"""What ``mortise doctor`` says of a run on NVIDIA GPUs: torch, Triton, DeepGEMM, DeepEP."""

from __future__ import annotations

import importlib.metadata
import shutil
from typing import TYPE_CHECKING, Final

import torch

from mortise.plugin import BackendUnusableError, Finding, Verdict
from mortise_cuda_common import exchange_doctor
from mortise_cuda_common.chip import EMULATED as EMULATED_CHIPS
from mortise_cuda_common.device import EMULATED
from mortise_cuda_common.environment import read_environment
from mortise_cuda_common.libraries import deep_ep, deep_gemm

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mortise.plugin import DoctorRequest
    from mortise_cuda_common.chip import Architecture
    from mortise_cuda_common.options import CommonOptions

TRITON: Final = "triton"
COMPILERS: Final = ("gcc", "clang")
"""What Triton builds the launcher of a program with."""


def findings(
    request: DoctorRequest, options: CommonOptions, emulated: Architecture
) -> Iterator[Finding]:
    """Look at what can be looked at without touching the device or importing its libraries.

    Args:
        request: the run.
        options: the backend's table of the configuration.
        emulated: the chip that ``device = "emulated"`` is.
    """
    if request.device == EMULATED:
        name = EMULATED_CHIPS[emulated].name
        yield Finding("device", Verdict.OK, f"an emulated {name}, which needs no library")
        return
    yield _torch()
    yield _triton()
    if options.wants_deep_gemm:
        demanded = options.demands_deep_gemm
        yield _library("DeepGEMM", deep_gemm.require_installed, demanded=demanded)
    if request.world_size > 1 and options.exchange != "portable":
        demanded = options.exchange == "deep_ep"
        yield _library("DeepEP", deep_ep.require_installed, demanded=demanded)
        num_sms = EMULATED_CHIPS[emulated].num_sms
        yield from exchange_doctor.findings(request, num_sms, read_environment(), demanded=demanded)


def _torch() -> Finding:
    cuda = torch.version.cuda
    if cuda is None:
        return Finding(
            "torch",
            Verdict.FAIL,
            f"{torch.__version__} is built without CUDA",
            "install a torch that is built for CUDA 12.9 or later",
        )
    return Finding("torch", Verdict.OK, f"{torch.__version__}, built for CUDA {cuda}")


def _triton() -> Finding:
    try:
        version = importlib.metadata.version(TRITON)
    except importlib.metadata.PackageNotFoundError:
        return Finding(
            TRITON,
            Verdict.FAIL,
            "is not installed, and the backend's own programs are written in it",
            "install a torch that is built for CUDA, which brings it",
        )
    path = read_environment().search_path or ""
    if not any(shutil.which(compiler, path=path) for compiler in COMPILERS):
        return Finding(
            TRITON,
            Verdict.NOTE,
            f"{version}, which builds the launchers of programs with a C compiler, and neither"
            f" {' nor '.join(COMPILERS)} is on PATH",
            "install gcc, unless the variable CC names a compiler",
        )
    return Finding(TRITON, Verdict.OK, version)


def _library(name: str, look: Callable[[], str], *, demanded: bool) -> Finding:
    """One library: what was found of it, or why it will not be used."""
    try:
        return Finding(name, Verdict.OK, look())
    except BackendUnusableError as error:
        verdict = Verdict.FAIL if demanded else Verdict.NOTE
        details = "; ".join([error.what, *error.details])
        return Finding(name, verdict, details, error.remedy or "")
