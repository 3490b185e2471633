"""Triton programs compiled for the GPU that is here, and started on its current stream."""

from __future__ import annotations

import importlib
import inspect
from typing import TYPE_CHECKING, Any

import torch

from mortise.plugin import BackendUnusableError, ReasonCode
from mortise_cuda_common.device import INSTEAD
from mortise_cuda_common.programs.base import Programs

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence


class CompiledPrograms(Programs):
    """Compiles each program when it is first launched.

    Triton compiles a program once for every choice of constants and of formats of its arguments,
    and keeps what it compiled in its own directory for later processes. Of a number that is no
    constant it would look at more: whether it is 1, or a multiple of 16. Here it does so of strides
    only (parameters whose names end so), since a count of tokens is another one at each step, and
    no step shall wait for a compiler.

    Args:
        device: the GPU, whichever is the current one of the thread that launches; None is that one.

    Raises:
        BackendUnusableError: Triton is missing or cannot be imported.
    """

    __slots__ = ("_compiled", "_device", "_triton")

    def __init__(self, device: torch.device | None = None) -> None:
        self._triton = _imported()
        self._device = device
        self._compiled: dict[Callable[..., None], Any] = {}

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
        """Start the programs on the current stream of the GPU; does not wait for them."""
        if not grid:
            return
        program = self._program(source, arguments)
        with torch.cuda.device(self._device):
            program[(grid,)](*arguments, **constants, num_warps=num_warps, num_stages=num_stages)

    def _program(self, source: Callable[..., None], arguments: Sequence[Any]) -> Any:
        """The program as Triton's; one object for each source."""
        program = self._compiled.get(source)
        if program is None:
            numbers = [
                name
                for name, one in zip(inspect.signature(source).parameters, arguments, strict=False)
                if isinstance(one, (int, float)) and not name.endswith("stride")
            ]
            program = self._triton.jit(source, do_not_specialize=numbers)
            program = self._compiled.setdefault(source, program)
        return program


def _imported() -> Any:
    try:
        return importlib.import_module("triton")
    except ImportError as error:
        raise BackendUnusableError(
            f"{type(error).__name__}: {' '.join(str(error).split())}",
            reason=ReasonCode.IMPORT_FAILED,
            details=["while importing triton, which compiles this backend's programs"],
            remedy=f"install the triton that torch for CUDA brings along, {INSTEAD}",
        ) from error
