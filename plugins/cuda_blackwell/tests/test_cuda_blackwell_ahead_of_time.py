"""Every program of NVFP4 compiled for both chips, on a machine without a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from plugins.cuda_common.tests.ahead_of_time import cases, check_compiled, on_every_chip
from plugins.cuda_common.tests.interpreted import needs_triton

from mortise_cuda_blackwell import kernels
from mortise_cuda_common.chip import Architecture

if TYPE_CHECKING:
    from mortise_cuda_common.programs.base import CompileCase

pytestmark = needs_triton


@pytest.mark.parametrize(("case", "chip"), on_every_chip(kernels))
def test_a_program_is_compiled_to_what_was_meant(case: CompileCase, chip: Architecture) -> None:
    check_compiled(case, chip)


def test_every_program_is_compiled_for_both_chips() -> None:
    found = list(cases(kernels))
    assert len({case.name for case in found}) == len(found)
    chips: dict[str, set[Architecture]] = {}
    for case in found:
        chips.setdefault(case.source.__module__, set()).update(case.architectures)
        assert case.instructions or case.source.__name__ == "quantise_kernel"
    assert len(chips) == 4
    assert all(some == {Architecture.SM100, Architecture.SM103} for some in chips.values())
