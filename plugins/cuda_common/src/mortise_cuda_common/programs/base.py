"""What runs Triton programs, and the cases in which each program is compiled ahead of time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from mortise_cuda_common.chip import Architecture


class Programs(ABC):
    """Runs Triton programs: compiled for the chip, or on a CPU.

    A program is a plain function that calls nothing but ``tl``, the global name of its module for
    the Triton language; whoever runs it puts its own in place. A number among its parameters is
    compiled in no way, but for one whose name ends in ``stride``: Triton compiles the program once
    for multiples of 16 and once for others, and again for 1.
    """

    __slots__ = ()

    @abstractmethod
    def launch(
        self,
        source: Callable[..., None],
        grid: int,
        arguments: Sequence[Any],
        constants: Mapping[str, int | float | bool],
        *,
        num_warps: int = 4,
        num_stages: int = 3,
    ) -> None:
        """Start ``grid`` programs, on one axis; none for 0.

        Args:
            source: the program.
            grid: how many; at most 2^31 - 1.
            arguments: tensors, whose pointers it gets, and numbers, in the order of its parameters.
            constants: its ``constexpr`` parameters by name.
            num_warps: of each compiled program.
            num_stages: of its loops that are pipelined.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class CompileCase:
    """One way in which a program is compiled, for the proof that it can be.

    Args:
        name: what the case is about.
        source: the program.
        signature: Triton's type of each parameter that is no constant (``*bf16``, ``*fp8e4nv``,
            ``i32``), in order.
        constants: its constants.
        architectures: chips that it is for.
        num_warps, num_stages: as launched.
        instructions: for each chip a regular expression that its PTX must match, the tensor-core
            instruction that was meant; chips that are missing have none.
        most_spilled_bytes: bytes of registers that may be spilled to memory.
        divisible_by_16: parameters, pointers or strides, that are multiples of 16, as a launch
            would find out by itself; None is all pointers.
    """

    name: str
    source: Callable[..., None]
    signature: Mapping[str, str]
    constants: Mapping[str, int | float | bool]
    architectures: tuple[Architecture, ...]
    num_warps: int = 4
    num_stages: int = 3
    instructions: Mapping[Architecture, str] = field(default_factory=dict)
    most_spilled_bytes: int = 0
    divisible_by_16: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        """Keep no dictionary that somebody could change."""
        for name in ("signature", "constants", "instructions"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))
