"""The chip that one model role runs on, and everything that computes there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from mortise_cuda_common.chip import Chip
    from mortise_cuda_common.libraries.deep_gemm import DeepGEMM
    from mortise_cuda_common.programs.base import Programs


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """What a backend computes with; one for each model role.

    Args:
        chip: the chip, or the one that is emulated.
        device: where tensors live.
        emulated: whether the chip is.
        programs: runs Triton programs.
        deep_gemm: the adapter of DeepGEMM, or None where it is not used.
        no_deep_gemm: why it is not used, in words.
    """

    chip: Chip
    device: torch.device
    emulated: bool
    programs: Programs
    deep_gemm: DeepGEMM | None = None
    no_deep_gemm: str = ""
