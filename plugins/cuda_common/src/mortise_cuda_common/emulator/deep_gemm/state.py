"""What DeepGEMM keeps for a process: here it belongs to one object, and two never meet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mortise_cuda_common.chip import Architecture

if TYPE_CHECKING:
    from mortise_cuda_common.chip import Chip

LEGACY_ALIGNMENT = 128
"""Rows that groups are padded to unless another number was set."""


@dataclass(slots=True)
class State:
    """One emulated library.

    Args:
        chip: that it computes on.
        num_sms: streaming multiprocessors that kernels are planned for.
        alignment: rows that contiguous groups begin at multiples of, and rows of one tile.
        tensor_core_percent: what ``set_tc_util`` was told; it steers timing alone.
        dependent_launch: what ``set_pdl`` was told; it steers timing alone.
    """

    chip: Chip
    num_sms: int
    alignment: int = LEGACY_ALIGNMENT
    tensor_core_percent: int = 100
    dependent_launch: bool = False

    @property
    def is_sm90(self) -> bool:
        """Whether the kernels are those with float32 scales."""
        return self.chip.architecture is Architecture.SM90
