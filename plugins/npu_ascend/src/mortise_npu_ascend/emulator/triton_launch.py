"""Triton programs run by torch on the CPU, one after the other, within the launcher's limit."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import FunctionType
from typing import TYPE_CHECKING, Any, Final

import torch

from mortise_npu_ascend.emulator.poison import unwritten

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

MOST_PROGRAMS: Final = 65535
_TOO_MANY: Final = (
    'grid should be less than 65536! You can try "export TRITON_ALL_BLOCKS_PARALLEL=1" to avoid '
    "this problem."
)
_MOST_OFFSET: Final = 2**31


@dataclass(frozen=True)
class Pointer:
    """Addresses in the memory of one tensor, counted in its numbers.

    Attributes:
        memory: everything from the tensor's first number on.
        offsets: a number, or one for each lane.
    """

    memory: torch.Tensor
    offsets: torch.Tensor | int = 0

    @classmethod
    def to(cls, tensor: torch.Tensor) -> Pointer:
        """To the first number of a tensor."""
        there = tensor.untyped_storage().nbytes() // tensor.element_size()
        size = there - tensor.storage_offset()
        return cls(tensor.as_strided((size,), (1,), tensor.storage_offset()))

    def __add__(self, further: torch.Tensor | int) -> Pointer:
        return Pointer(self.memory, self.offsets + further)

    def lanes(self, mask: torch.Tensor) -> torch.Tensor:
        """Offsets of all lanes, 0 where the mask has none.

        Raises:
            RuntimeError: one lies outside, or is too large for the 32 bits it is computed in.
        """
        offsets = torch.as_tensor(self.offsets).broadcast_to(mask.shape).masked_fill(~mask, 0)
        highest = min(self.memory.shape[0], _MOST_OFFSET)
        if bool(((offsets < 0) | (offsets >= highest)).any()):
            raise RuntimeError(f"an offset of a Triton program lies outside of [0, {highest})")
        return offsets


class Language:
    """The part of ``triton.language`` that the plugin's programs use, for one program of a grid."""

    def __init__(self, place: Sequence[int], grid: Sequence[int]) -> None:
        self._place = place
        self._grid = grid

    def program_id(self, axis: int) -> int:
        """Place of this program in the grid."""
        return self._place[axis]

    def num_programs(self, axis: int) -> int:
        """Programs along one axis of the grid."""
        return self._grid[axis]

    def arange(self, start: int, end: int) -> torch.Tensor:
        """Numbers from ``start`` up to ``end``, as many as a power of two.

        Raises:
            ValueError: another number of them, which Triton does not compile.
        """
        if (end - start).bit_count() != 1:
            raise ValueError("arange's range must be a power of 2")
        return torch.arange(start, end)

    def load(self, pointer: Pointer, mask: torch.Tensor) -> torch.Tensor:
        """Numbers from memory; lanes without a mask are undefined."""
        values = pointer.memory[pointer.lanes(mask)]
        return torch.where(mask, values, unwritten((), values.dtype))

    def store(self, pointer: Pointer, values: torch.Tensor, mask: torch.Tensor) -> None:
        """Numbers to memory, where the mask says so."""
        pointer.memory[pointer.lanes(mask)[mask]] = values[mask]


def launch(
    program: Callable[..., None],
    grid: Sequence[int],
    arguments: Sequence[Any],
    constants: Mapping[str, int],
) -> None:
    """Run a Triton program once for each place in the grid.

    Args:
        program: its source, not compiled; it may call nothing but ``tl``.
        grid: programs along each axis.
        arguments: tensors, whose pointers it gets, and numbers.
        constants: its ``constexpr`` arguments.

    Raises:
        RuntimeError: the grid has 65,536 programs or more, in the words of triton-ascend 3.2; or
            one of them reads or writes outside of a tensor.
    """
    if math.prod(grid) > MOST_PROGRAMS:
        raise RuntimeError(_TOO_MANY)
    passed = [Pointer.to(one) if isinstance(one, torch.Tensor) else one for one in arguments]
    for place in torch.cartesian_prod(*(torch.arange(size) for size in grid)).reshape(
        -1, len(grid)
    ):
        names = {**program.__globals__, "tl": Language(place.tolist(), grid)}
        FunctionType(program.__code__, names)(*passed, **constants)
