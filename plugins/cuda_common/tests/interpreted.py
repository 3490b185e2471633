"""Triton's own interpreter, which judges what the emulation computes."""

from __future__ import annotations

import importlib
import importlib.util
from types import FunctionType
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="triton is not installed: nothing was compiled, and its own interpreter was not asked",
)


def interpret(
    source: Callable[..., None],
    grid: int,
    arguments: Sequence[Any],
    constants: Mapping[str, int | float | bool],
) -> None:
    """Run a program in the interpreter of Triton; the program's own module stays as it is.

    It is asked about addresses, masks, integers and float32 only: its casts to short formats do not
    round as chips do (triton 3.6.0: to bfloat16 it cuts off, to e4m3 it loses carries).
    """
    interpreter = importlib.import_module("triton.runtime.interpreter")
    language = importlib.import_module("triton.language")
    names = {**source.__globals__, "tl": language}
    program = FunctionType(source.__code__, names, source.__name__, source.__defaults__)
    program.__annotations__ = dict(source.__annotations__)
    interpreter.InterpretedFunction(program)[(grid,)](*arguments, **constants)
