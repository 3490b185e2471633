"""From the configuration of one model role to everything that it computes with."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch

from mortise.plugin import BackendUnusableError, DeviceProbe
from mortise_cuda_common.chip import EMULATED as EMULATED_CHIPS
from mortise_cuda_common.device import EMULATED, chip_of, device_number
from mortise_cuda_common.libraries.deep_gemm import DeepGEMM
from mortise_cuda_common.programs.compiled import CompiledPrograms
from mortise_cuda_common.programs.emulated import EmulatedPrograms
from mortise_cuda_common.runtime import Runtime

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mortise.plugin import BindContext
    from mortise_cuda_common.chip import Architecture, Chip
    from mortise_cuda_common.options import CommonOptions

NOT_WANTED = "the configuration chooses Triton"


def load_runtime(
    backend: str,
    architectures: Sequence[Architecture],
    context: BindContext,
    options: CommonOptions,
    emulated: Architecture,
) -> Runtime:
    """Get a chip, or the emulation of one where that was asked for.

    Args:
        backend: name of the backend.
        architectures: chips that it is made for.
        context: of the role; its device is ``emulated``, ``cuda``, ``cuda:N`` or None, which is the
            GPU and never its emulation.
        options: the backend's table.
        emulated: which chip is emulated.

    Warns:
        RuntimeWarning: DeepGEMM is not used although the configuration leaves it the choice, and
            why.

    Raises:
        ConfigError: no such device text.
        BackendUnusableError: the chip, Triton, or a library that was demanded is missing or does
            not fit.
    """
    if context.device == EMULATED:
        return _emulated(EMULATED_CHIPS[emulated], options)
    number = device_number(context.device, backend, context.local_rank)
    chip = chip_of(number, architectures)
    device = torch.device("cuda", number)
    torch.cuda.set_device(device)
    programs = CompiledPrograms(device)
    deep_gemm, why_not = _deep_gemm(chip, device, options)
    return Runtime(
        chip=chip,
        device=device,
        emulated=False,
        programs=programs,
        deep_gemm=deep_gemm,
        no_deep_gemm=why_not,
    )


def _emulated(chip: Chip, options: CommonOptions) -> Runtime:
    wanted = options.wants_deep_gemm
    return Runtime(
        chip=chip,
        device=torch.device("cpu"),
        emulated=True,
        programs=EmulatedPrograms(),
        deep_gemm=DeepGEMM.emulated(chip) if wanted else None,
        no_deep_gemm="" if wanted else NOT_WANTED,
    )


def _deep_gemm(
    chip: Chip, device: torch.device, options: CommonOptions
) -> tuple[DeepGEMM | None, str]:
    if not options.wants_deep_gemm:
        return None, NOT_WANTED
    try:
        return DeepGEMM.load(chip, device), ""
    except BackendUnusableError as error:
        if options.demands_deep_gemm:
            raise
        advice = f" ({error.remedy})" if error.remedy else ""
        warnings.warn(
            f"DeepGEMM is not used, this backend's own Triton programs are: {error.what}{advice}",
            RuntimeWarning,
            stacklevel=2,
        )
        return None, error.what


def probe(architectures: Sequence[Architecture]) -> DeviceProbe:
    """Say whether the first GPU is one of these, and whether DeepGEMM can be imported beside it.

    Raises:
        BackendUnusableError: torch is built without CUDA, or Triton is missing.
    """
    chip = chip_of(0, architectures)
    CompiledPrograms()
    try:
        library = DeepGEMM.imported_version()
        said = f"DeepGEMM {library} can be imported"
    except BackendUnusableError as error:
        advice = f" ({error.remedy})" if error.remedy else ""
        said = f"DeepGEMM cannot be used: {error.what}{advice}"
    return DeviceProbe(
        found=True, arch=chip.architecture.value, reason=f"torch sees {chip.name}; {said}"
    )
