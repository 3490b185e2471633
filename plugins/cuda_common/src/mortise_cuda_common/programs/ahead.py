"""Programs compiled ahead of time for a chip that is not here, by the triton wheel alone."""

from __future__ import annotations

import importlib
import inspect
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from mortise_cuda_common.chip import Architecture

if TYPE_CHECKING:
    from mortise_cuda_common.programs.base import CompileCase

_CAPABILITY: Final = MappingProxyType(
    {Architecture.SM90: 90, Architecture.SM100: 100, Architecture.SM103: 103}
)
_WARP: Final = 32
_DIVISIBLE: Final = (("tt.divisibility", 16),)
_USAGE: Final = re.compile(r"REG:(\d+) STACK:(\d+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiled:
    """One program compiled for one chip.

    Args:
        ptx: its instructions as Triton hands them to ptxas.
        shared_bytes: shared memory of one program.
        registers: of one thread.
        spilled_bytes: stack of one thread, where registers are spilled; Triton puts nothing else
            there.
    """

    ptx: str
    shared_bytes: int
    registers: int
    spilled_bytes: int


def compile_ahead(case: CompileCase, architecture: Architecture) -> Compiled:
    """Compile one case as its launch would; no GPU is needed, and no CUDA toolkit.

    Args:
        case: the program and what it is compiled with.
        architecture: the chip; Triton compiles for all of its instructions (``sm_90a``,
            ``sm_100a``, ``sm_103a``).

    Raises:
        ModuleNotFoundError: Triton is not installed.
        ValueError: the case has not the program's parameters, or knows more of them than a launch.
    """
    triton = importlib.import_module("triton")
    compiler = importlib.import_module("triton.compiler")
    backends = importlib.import_module("triton.backends.compiler")
    compiled = triton.compile(
        compiler.ASTSource(**_source(case, triton)),
        target=backends.GPUTarget("cuda", _CAPABILITY[architecture], _WARP),
        options={"num_warps": case.num_warps, "num_stages": case.num_stages},
    )
    registers, stack = _resources(triton, compiled.asm["cubin"])
    return Compiled(
        ptx=compiled.asm["ptx"],
        shared_bytes=compiled.metadata.shared,
        registers=registers,
        spilled_bytes=stack,
    )


def _source(case: CompileCase, triton: Any) -> dict[str, Any]:
    """What Triton's own launcher finds out about the arguments of a launch."""
    names = list(inspect.signature(case.source).parameters)
    if set(names) != {*case.signature, *case.constants}:
        odd = sorted(set(names) ^ {*case.signature, *case.constants})
        raise ValueError(f"{case.name}: {odd} are parameters of the case or of its program only")
    divisible = case.divisible_by_16
    if divisible is None:
        divisible = tuple(name for name, kind in case.signature.items() if kind.startswith("*"))
    unknown = [
        name
        for name in divisible
        if not case.signature[name].startswith("*") and not name.endswith("stride")
    ]
    if unknown:
        raise ValueError(f"{case.name}: a launch asks of no {unknown} whether 16 divides it")
    return {
        "fn": triton.jit(case.source),
        "signature": {name: case.signature.get(name, "constexpr") for name in names},
        "constexprs": {(names.index(name),): value for name, value in case.constants.items()},
        "attrs": {(names.index(name),): [list(one) for one in _DIVISIBLE] for name in divisible},
    }


def _resources(triton: Any, cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack of a thread, as the wheel's own cuobjdump tells them."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        told = subprocess.run(
            [str(tool), "--dump-resource-usage", file.name],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    # One program makes one kernel; the line before tells what is common to all of them.
    ((registers, stack),) = _USAGE.findall(told)
    return int(registers), int(stack)
