"""Triton programs run by torch on a CPU."""

from __future__ import annotations

from types import FunctionType
from typing import TYPE_CHECKING, Any, Final

import torch

from mortise_cuda_common.programs import blocks, dtypes
from mortise_cuda_common.programs.base import Programs
from mortise_cuda_common.programs.language import Language
from mortise_cuda_common.programs.pointers import Pointer
from mortise_cuda_common.programs.scalars import Int32, Int64
from mortise_cuda_common.programs.together import Writes, run_together
from mortise_cuda_common.programs.values import Value

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

MOST_PROGRAMS: Final = 2**31 - 1
"""Programs on the first axis of a launch's grid (CUDA C++ Programming Guide, table 30)."""


class EmulatedPrograms(Programs):
    """Runs the source that is compiled for a chip, with :class:`Language` in place of Triton's."""

    __slots__ = ()

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
        """Run all programs, at once those that take the same way.

        Raises:
            IndexError: one of them reads or writes outside of a tensor.
            OverflowError: a single integer outgrows its format.
            ValueError: more programs than a launch has, or what Triton does not compile.
        """
        if not 0 <= grid <= MOST_PROGRAMS:
            raise ValueError(f"a grid has up to {MOST_PROGRAMS} programs, not {grid}")
        self._run(source, range(grid), grid, arguments, constants)

    def run_one(
        self,
        source: Callable[..., None],
        place: int,
        grid: int,
        arguments: Sequence[Any],
        constants: Mapping[str, int | float | bool],
    ) -> None:
        """Run only the program at one place of a grid, which may be too large to run all of it."""
        self._run(source, range(place, place + 1), grid, arguments, constants)

    def _run(
        self,
        source: Callable[..., None],
        places: range,
        grid: int,
        arguments: Sequence[Any],
        constants: Mapping[str, int | float | bool],
    ) -> None:
        passed = [_passed(one) for one in arguments]
        # Bounds of a loop that are a program's numbers give numbers of the same width.
        names = {**source.__globals__, "range": blocks.loop}
        program = FunctionType(source.__code__, names, source.__name__, source.__defaults__)

        def run(group: Sequence[int]) -> None:
            writes = Writes(len(group)) if len(group) > 1 else None
            names["tl"] = Language(group, grid, writes)
            program(*passed, **constants)
            if writes is not None:
                writes.commit()

        with torch.no_grad():
            run_together(run, places)


def _passed(argument: Any) -> Any:
    if isinstance(argument, torch.Tensor):
        return Pointer.of(argument)
    if isinstance(argument, int) and not isinstance(argument, bool):
        return Int32(argument) if -(2**31) <= argument < 2**31 else Int64(argument)
    if isinstance(argument, float):
        return Value(torch.tensor([argument], dtype=torch.float32), dtypes.float32)
    return argument
