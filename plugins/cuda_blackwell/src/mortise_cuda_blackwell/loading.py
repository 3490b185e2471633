"""The library that this chip has use for beside those of all NVIDIA GPUs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mortise.plugin import BackendChoice, BackendUnusableError, Finding, Verdict
from mortise_cuda_blackwell.libraries import flashinfer
from mortise_cuda_blackwell.libraries.flashinfer import FlashInfer
from mortise_cuda_common.device import EMULATED

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mortise.plugin import DoctorRequest
    from mortise_cuda_blackwell.options import Options
    from mortise_cuda_common.runtime import Runtime


def load_flash_infer(runtime: Runtime, options: Options) -> FlashInfer | None:
    """FlashInfer, or its emulation, where the configuration asks for it.

    Raises:
        BackendUnusableError: it was asked for and cannot be used.
    """
    if options.nvfp4 != "flashinfer":
        return None
    return FlashInfer.emulated() if runtime.emulated else FlashInfer.load(runtime.device)


def library_findings(request: DoctorRequest, options: Options) -> Iterator[Finding]:
    """Whether FlashInfer is installed, where the run would use it; nothing is imported."""
    if options.nvfp4 != "flashinfer" or request.device == EMULATED:
        return
    try:
        yield Finding("FlashInfer", Verdict.OK, flashinfer.installed())
    except BackendUnusableError as error:
        yield Finding("FlashInfer", Verdict.FAIL, error.what, error.remedy or "")


def library_choices(flash_infer: FlashInfer | None) -> Iterator[BackendChoice]:
    """FlashInfer: its version, or why it is left out."""
    if flash_infer is None:
        yield BackendChoice(
            subject="FlashInfer", value="not used", reason="option nvfp4 is 'triton'"
        )
        return
    how = "its emulation" if flash_infer.is_emulated else "compared with torch at loading"
    yield BackendChoice(
        subject="FlashInfer",
        value=flash_infer.version,
        reason=f"{how}; it multiplies NVFP4 rows in slots",
    )
