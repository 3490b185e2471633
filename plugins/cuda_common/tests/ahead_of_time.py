"""What is asked of every program that is compiled for a chip that is not here."""

from __future__ import annotations

import importlib
import pkgutil
import re
from typing import TYPE_CHECKING

import pytest

from mortise_cuda_common.chip import EMULATED
from mortise_cuda_common.programs.ahead import compile_ahead

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

    from mortise_cuda_common.chip import Architecture
    from mortise_cuda_common.programs.base import CompileCase


def cases(package: ModuleType) -> Iterator[CompileCase]:
    """``CASES`` of every module of a package."""
    for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        yield from getattr(importlib.import_module(module.name), "CASES", ())


def on_every_chip(package: ModuleType) -> list[object]:
    """A case and a chip for each test, with a name to tell which."""
    return [
        pytest.param(case, chip, id=f"{case.name}, {chip.value}")
        for case in cases(package)
        for chip in case.architectures
    ]


def check_compiled(case: CompileCase, chip: Architecture) -> None:
    """It compiles, to the instruction that was meant, within what the chip has."""
    compiled = compile_ahead(case, chip)
    wanted = case.instructions.get(chip)
    assert wanted is None or re.search(wanted, compiled.ptx), f"no {wanted} in its PTX"
    most = EMULATED[chip].shared_memory
    assert compiled.shared_bytes <= most, f"{compiled.shared_bytes} of {most} bytes shared"
    assert compiled.spilled_bytes <= case.most_spilled_bytes, f"{compiled.spilled_bytes} spilled"
