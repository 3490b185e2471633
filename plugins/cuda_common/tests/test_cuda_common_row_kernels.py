"""Rows that are quantised and gated by programs, judged by the core's formats bit for bit."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from plugins.cuda_common.tests.kernel_cases import (
    BF16,
    FORMATS,
    HALF,
    any_groups,
    groups_of,
    is_untouched,
    normal,
    places,
    poisoned,
)

from mortise.formats.fp8 import quantise_fp8_rows
from mortise.plugin import ScaleFormat
from mortise_cuda_common.kernels.fp8_rows import quantise_rows
from mortise_cuda_common.kernels.swiglu import swiglu, swiglu_quantise
from mortise_cuda_common.rows import Kind

if TYPE_CHECKING:
    from plugins.cuda_common.tests.kernel_cases import Machine

    from mortise_cuda_common.groups import Groups
    from mortise_cuda_common.rows import Rows

DTYPES = (BF16, torch.float32)
# Whole groups of 128 columns; a last one that is shorter; less than one.
WIDTHS = (256, 200, 24)


def assert_same_rows(
    found: Rows, values: torch.Tensor, scales: torch.Tensor, place: slice = slice(None)
) -> None:
    assert found.scales is not None
    found_values, found_scales = found.values[place].cpu(), found.scales[place].cpu()
    assert torch.equal(found_values.view(torch.uint8), values[place].view(torch.uint8))
    assert torch.equal(
        found_scales.contiguous().view(torch.int32), scales[place].contiguous().view(torch.int32)
    )


@pytest.mark.parametrize("scale_format", FORMATS)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(groups=any_groups(), width=st.sampled_from(WIDTHS), dtype=st.sampled_from(DTYPES))
def test_rows_of_groups_are_quantised_as_the_format_says(
    machine: Machine, groups: Groups, width: int, dtype: torch.dtype, scale_format: ScaleFormat
) -> None:
    rows_RK = poisoned(normal(width, groups.num_rows, width, dtype=dtype) * 3, groups)
    found = quantise_rows(
        machine.programs, machine.on(rows_RK), machine.groups(groups), scale_format
    )
    for _, place in places(groups):
        assert_same_rows(found, *quantise_fp8_rows(rows_RK, scale_format), place)
    if machine.is_emulated:
        assert is_untouched(found.values, groups)
        assert found.scales is not None
        assert is_untouched(found.scales, groups)


@pytest.mark.parametrize("scale_format", FORMATS)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(numbers=st.lists(st.floats(width=32), min_size=1, max_size=140))
def test_any_numbers_are_quantised_as_the_format_says(
    machine: Machine, numbers: list[float], scale_format: ScaleFormat
) -> None:
    rows_RK = torch.tensor([numbers])
    found = quantise_rows(machine.programs, machine.on(rows_RK), None, scale_format)
    assert_same_rows(found, *quantise_fp8_rows(rows_RK, scale_format))


@pytest.mark.parametrize("scale_format", FORMATS)
def test_scales_next_to_powers_of_two(machine: Machine, scale_format: ScaleFormat) -> None:
    """amax / 448 just below, at and just above powers of two, down to the least of all."""
    powers = 448 * 2.0 ** torch.arange(-44, 40)
    amax = torch.cat((powers, powers.nextafter(powers * 2), powers.nextafter(powers / 2)))
    rows_RK = amax[:, None] * torch.linspace(-1, 1, 128)
    found = quantise_rows(machine.programs, machine.on(rows_RK), None, scale_format)
    assert_same_rows(found, *quantise_fp8_rows(rows_RK, scale_format))


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("scale_format", FORMATS)
def test_what_is_no_number_spoils_its_own_group_only(
    machine: Machine, number: float, scale_format: ScaleFormat
) -> None:
    rows_RK = normal(3, 5, 256)
    rows_RK[2, 7] = number
    found = quantise_rows(machine.programs, machine.on(rows_RK), None, scale_format)
    assert_same_rows(found, *quantise_fp8_rows(rows_RK, scale_format))
    numbers = found.values.cpu().float().isfinite()
    # Under a power of two, which is never infinite, infinity becomes the largest number.
    assert numbers[2, 7] == (scale_format is ScaleFormat.UE8M0 and number == number)
    assert numbers[2, 128:].all()
    assert numbers[[0, 1, 3, 4]].all()


def test_scales_lie_column_after_column_where_tma_can_read_them(machine: Machine) -> None:
    rows = quantise_rows(machine.programs, machine.on(normal(1, 13, 300)), None, FORMATS[0])
    assert rows.kind is Kind.FP8
    assert rows.scales is not None
    assert rows.scales.shape == (13, 3)
    assert rows.scales.stride() == (1, 16)


def test_rows_that_are_apart_and_no_rows_at_all(machine: Machine) -> None:
    wide = machine.on(normal(2, 9, 512))
    found = quantise_rows(machine.programs, wide[:, 128:384], None, FORMATS[0])
    assert_same_rows(found, *quantise_fp8_rows(wide[:, 128:384].cpu()))
    none = quantise_rows(machine.programs, wide[:0], None, FORMATS[0])
    assert none.values.shape == (0, 512)
    empty = machine.groups(groups_of([0, 0]))
    assert quantise_rows(machine.programs, wide[:5], empty, FORMATS[0]).values.shape == (5, 512)


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=10, deadline=None, derandomize=True)
@given(groups=any_groups(), width=st.sampled_from(WIDTHS))
def test_swiglu_rounds_as_often_as_torch_does(
    machine: Machine, groups: Groups, width: int, dtype: torch.dtype
) -> None:
    gate_up = poisoned(normal(width, groups.num_rows, 2 * width, dtype=dtype) * 4, groups)
    found = swiglu(machine.programs, machine.on(gate_up), machine.groups(groups)).cpu()
    assert found.dtype is dtype
    for _, place in places(groups):
        gate, up = gate_up[place].double().chunk(2, dim=1)
        silu = F.silu(gate)
        # In float32 before; the two roundings to the dtype; what an exp is off by, for its gate.
        error = 2 * HALF[dtype] + 3 * machine.other + gate.abs() * 2 * HALF[torch.float32]
        assert ((found[place].double() - silu * up).abs() <= 1.01 * error * (silu * up).abs()).all()
    if machine.is_emulated:
        assert is_untouched(found, groups)


def test_swiglu_is_that_of_torch_but_for_the_last_bit_of_an_exp(machine: Machine) -> None:
    """Of 2^16 numbers few lie so near to an edge between two that the exp decides."""
    gate_up = normal(11, 256, 512) * 4
    gate, up = gate_up.chunk(2, dim=1)
    found = swiglu(machine.programs, machine.on(gate_up), None).cpu()
    assert (found == F.silu(gate) * up).double().mean() > 0.99


@pytest.mark.parametrize("scale_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gating_and_quantising_at_once_is_both_after_another(
    machine: Machine, dtype: torch.dtype, scale_format: ScaleFormat
) -> None:
    groups = groups_of([3, 0, 40])
    gate_up = machine.on(poisoned(normal(5, groups.num_rows, 400, dtype=dtype), groups))
    groups = machine.groups(groups)
    found = swiglu_quantise(machine.programs, gate_up, groups, scale_format)
    gated = swiglu(machine.programs, gate_up, groups)
    wanted = quantise_rows(machine.programs, gated, groups, scale_format)
    assert wanted.scales is not None
    for _, place in places(groups):
        assert_same_rows(found, wanted.values.cpu(), wanted.scales.cpu(), place)


def test_everything_in_one_program_of_few_rows_or_of_many(machine: Machine) -> None:
    """Both heights of tiles, which are chosen by shapes alone."""
    for counts in ([5], [70]):
        groups = replace(groups_of(counts), num_rows=counts[0])
        rows_RK = normal(counts[0], groups.num_rows, 128)
        found = quantise_rows(
            machine.programs, machine.on(rows_RK), machine.groups(groups), FORMATS[1]
        )
        assert found.kind is Kind.FP8_UE8M0
        assert_same_rows(found, *quantise_fp8_rows(rows_RK, FORMATS[1]))
