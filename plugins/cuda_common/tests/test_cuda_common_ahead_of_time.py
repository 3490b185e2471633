"""Every program is compiled for every chip that it is for, on a machine without a GPU."""

from __future__ import annotations

import importlib
import importlib.util
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from plugins.cuda_common.tests.ahead_of_time import cases, check_compiled, on_every_chip
from plugins.cuda_common.tests.interpreted import needs_triton

from mortise_cuda_common import kernels
from mortise_cuda_common.chip import Architecture
from mortise_cuda_common.kernels.qkv_plan import CASES as QKV_CASES
from mortise_cuda_common.programs.ahead import compile_ahead
from mortise_cuda_common.programs.base import CompileCase

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = needs_triton
tl: Any = importlib.import_module("triton.language") if importlib.util.find_spec("triton") else None


@pytest.mark.parametrize(("case", "chip"), on_every_chip(kernels))
def test_a_program_is_compiled_to_what_was_meant(case: CompileCase, chip: Architecture) -> None:
    check_compiled(case, chip)


def test_cases_have_names_of_their_own() -> None:
    names = [case.name for case in cases(kernels)]
    assert len(names) == len(set(names))
    assert {case.name for case in QKV_CASES} <= set(names)


@pytest.mark.parametrize("chip", Architecture)
def test_every_chip_is_compiled_for_with_all_of_its_instructions(chip: Architecture) -> None:
    """Those of tensor cores are in the sets whose names end in a."""
    compiled = compile_ahead(QKV_CASES[0], chip)
    assert f".target {chip}a" in compiled.ptx
    assert 0 < compiled.registers <= 255
    assert compiled.shared_bytes == compiled.spilled_bytes == 0


def test_a_case_that_asks_for_too_much_is_found_out() -> None:
    case, chip = QKV_CASES[0], Architecture.SM90
    with pytest.raises(AssertionError, match="no tcgen05 in its PTX"):
        check_compiled(replace(case, instructions={chip: "tcgen05"}), chip)
    signature = {name: kind for name, kind in case.signature.items() if name != "num_tokens"}
    with pytest.raises(ValueError, match=r"\['num_tokens'\] are parameters of the case or of"):
        compile_ahead(replace(case, signature=signature), chip)
    with pytest.raises(ValueError, match=r"asks of no \['num_tokens'\] whether 16 divides it"):
        compile_ahead(replace(case, divisible_by_16=("qkvz", "num_tokens")), chip)
    # A block of so many numbers for each thread cannot be kept in its registers.
    greedy = {**case.constants, "BLOCK_TOKENS": 256}
    with pytest.raises(AssertionError, match="spilled"):
        check_compiled(replace(case, constants=greedy), chip)


def quotient(one, other, target, N: tl.constexpr) -> None:  # type: ignore[no-untyped-def]
    lanes = tl.arange(0, N)
    tl.store(target + lanes, tl.load(one + lanes) / tl.load(other + lanes))


def nearest_quotient(one, other, target, N: tl.constexpr) -> None:  # type: ignore[no-untyped-def]
    lanes = tl.arange(0, N)
    tl.store(target + lanes, tl.div_rn(tl.load(one + lanes), tl.load(other + lanes)))


def power(one, other, target, N: tl.constexpr) -> None:  # type: ignore[no-untyped-def]
    lanes = tl.arange(0, N)
    tl.store(target + lanes, tl.exp2(tl.load(one + lanes)) - tl.load(other + lanes))


def root(one, other, target, N: tl.constexpr) -> None:  # type: ignore[no-untyped-def]
    lanes = tl.arange(0, N)
    tl.store(target + lanes, tl.sqrt(tl.load(one + lanes)) - tl.load(other + lanes))


def product_and_sum(one, other, target, N: tl.constexpr) -> None:  # type: ignore[no-untyped-def]
    lanes = tl.arange(0, N)
    number = tl.load(one + lanes)
    tl.store(target + lanes, number * tl.load(other + lanes) + number)


def as_e4m3(one, other, target, N: tl.constexpr) -> None:  # type: ignore[no-untyped-def]
    lanes = tl.arange(0, N)
    number = tl.maximum(tl.load(one + lanes), tl.load(other + lanes))
    tl.store(target + lanes, number.to(tl.float8e4nv).to(tl.float32))


@pytest.mark.parametrize(
    ("source", "instructions"),
    [
        (quotient, [r"div\.full\.f32"]),
        (nearest_quotient, [r"div\.rn\.f32"]),
        (power, [r"ex2\.approx\.ftz\.f32"]),
        (root, [r"sqrt\.approx\.ftz\.f32"]),
        (product_and_sum, [r"fma\.rn\.f32"]),
        (as_e4m3, [r"max\.f32", r"cvt\.rn\.satfinite\.e4m3x2\.f32"]),
    ],
)
@pytest.mark.parametrize("chip", Architecture)
def test_where_chips_do_not_compute_as_the_emulation_does(
    source: Callable[..., None], instructions: list[str], chip: Architecture
) -> None:
    """The page of the emulator says so; here it is read from what Triton compiles."""
    case = CompileCase(
        name=source.__name__,
        source=source,
        signature=dict.fromkeys(("one", "other", "target"), "*fp32"),
        constants={"N": 128},
        architectures=(chip,),
    )
    ptx = compile_ahead(case, chip).ptx
    assert all(re.search(rf"\s{one}\s", ptx) for one in instructions)
