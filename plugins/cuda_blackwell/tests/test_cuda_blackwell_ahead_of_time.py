"""Every program of NVFP4 compiled for both chips, without a GPU."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from mortise_cuda_blackwell.kernels import nvfp4_grouped, nvfp4_rows
from mortise_cuda_common.chip import EMULATED, Architecture
from mortise_cuda_common.programs.ahead import compile_ahead

if TYPE_CHECKING:
    from mortise_cuda_common.programs.base import CompileCase

pytest.importorskip("triton", reason="nothing is compiled without Triton")

CASES = [
    pytest.param(case, architecture, id=f"{case.name}, {architecture.value}")
    for case in (*nvfp4_rows.CASES, *nvfp4_grouped.CASES)
    for architecture in case.architectures
]


@pytest.mark.parametrize(("case", "architecture"), CASES)
def test_it_compiles_to_the_instruction_that_was_meant(
    case: CompileCase, architecture: Architecture
) -> None:
    compiled = compile_ahead(case, architecture)
    if case.instructions:
        assert re.search(case.instructions[architecture], compiled.ptx), case.name
    assert compiled.shared_bytes <= EMULATED[architecture].shared_memory
    assert compiled.spilled_bytes <= case.most_spilled_bytes


def test_every_program_is_compiled_for_both_chips() -> None:
    assert {
        architecture for case in nvfp4_grouped.CASES for architecture in case.architectures
    } == {
        Architecture.SM100,
        Architecture.SM103,
    }
    sources = {case.source.__module__ for case in (*nvfp4_rows.CASES, *nvfp4_grouped.CASES)}
    assert len(sources) == 4
