"""The chips of the NVIDIA backends, and the facts that kernels are planned with."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping


class Architecture(StrEnum):
    """A generation of chips, by the name that compilers give it."""

    SM90 = "sm_90"
    """Hopper: H100, H200, H20."""
    SM100 = "sm_100"
    """Blackwell: B100, B200, GB200."""
    SM103 = "sm_103"
    """Blackwell: B300, GB300."""

    @property
    def is_blackwell(self) -> bool:
        """Whether it has tensor memory, fp4 units and scales in blocks."""
        return self is not Architecture.SM90


@dataclass(frozen=True, slots=True, kw_only=True)
class Chip:
    """One chip.

    Args:
        name: as its driver gives it.
        architecture: its generation.
        num_sms: its streaming multiprocessors.
        shared_memory: bytes of shared memory that one block can have.
    """

    name: str
    architecture: Architecture
    num_sms: int
    shared_memory: int = 232_448  # 227 KiB on all three (CUDA C++ Programming Guide, table 30)


EMULATED: Final[Mapping[Architecture, Chip]] = MappingProxyType(
    {
        Architecture.SM90: Chip(name="H100", architecture=Architecture.SM90, num_sms=132),
        Architecture.SM100: Chip(name="B200", architecture=Architecture.SM100, num_sms=148),
        Architecture.SM103: Chip(name="B300", architecture=Architecture.SM103, num_sms=148),
    }
)
"""The chip that is emulated of each generation."""
