"""Grouped products of float8 by programs, judged by float64 and the most their sums can be off."""

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
    any_groups,
    dequantised,
    difference,
    fp8_error,
    fp8_rows,
    fp8_weight,
    groups_of,
    is_quantised,
    is_untouched,
    places,
    sums,
    swiglu,
    tiling_name,
)

from mortise.formats.weights import dequantise_weight
from mortise.plugin import ScaleFormat
from mortise_cuda_common.groups import Groups
from mortise_cuda_common.kernels.fp8_grouped import (
    GATE_UP_TILINGS,
    NARROW,
    PRODUCT_TILINGS,
    fp8_gate_up,
    fp8_product,
)
from mortise_cuda_common.rows import Kind, Rows

if TYPE_CHECKING:
    from plugins.cuda_common.tests.kernel_cases import Machine, Near

    from mortise.plugin import StoredWeight
    from mortise_cuda_common.kernels.tilings import Tiling

# Blocks of 128 x 128, fewer columns than one, one and a part; rows of both parts likewise.
DEPTHS = (128, 80, 272)
WIDTHS = (128, 40, 144)


def multiply(
    machine: Machine,
    rows: Rows,
    stored: StoredWeight,
    groups: Groups,
    dtype: torch.dtype = torch.float32,
    tiling: Tiling | None = None,
) -> torch.Tensor:
    assert stored.scale is not None
    return fp8_product(
        machine.programs,
        machine.rows(rows),
        machine.on(stored.weight),
        machine.on(stored.scale),
        machine.groups(groups),
        dtype,
        num_parts=stored.num_parts,
        tiling=tiling,
    ).cpu()


def gate_up(
    machine: Machine,
    rows: Rows,
    stored: StoredWeight,
    groups: Groups,
    then: ScaleFormat | None,
    tiling: Tiling | None = None,
) -> Rows:
    assert stored.scale is not None
    found = fp8_gate_up(
        machine.programs,
        machine.rows(rows),
        machine.on(stored.weight),
        machine.on(stored.scale),
        machine.groups(groups),
        then,
        tiling=tiling,
    )
    scales = None if found.scales is None else found.scales.cpu()
    return replace(found, values=found.values.cpu(), scales=scales)


def wanted(machine: Machine, rows: Rows, stored: StoredWeight, expert: int, place: slice) -> Near:
    weight_NK = dequantise_weight(stored, torch.float64)[expert]
    error = fp8_error(machine, weight_NK.shape[1])
    return sums(dequantised(rows, place), weight_NK, error)


@pytest.mark.parametrize("parts", [1, 2])
@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    groups=any_groups(),
    depth=st.sampled_from(DEPTHS),
    width=st.sampled_from(WIDTHS),
    scale_format=st.sampled_from(FORMATS),
    tiling=st.sampled_from([None, NARROW, *PRODUCT_TILINGS]),
)
def test_each_group_is_multiplied_by_its_expert(
    machine: Machine,
    groups: Groups,
    depth: int,
    width: int,
    scale_format: ScaleFormat,
    tiling: Tiling | None,
    parts: int,
) -> None:
    rows = fp8_rows(depth, groups, depth, scale_format)
    stored = fp8_weight(width, groups, parts * width, depth, parts)
    found = multiply(machine, rows, stored, groups, tiling=tiling)
    for expert, place in places(groups):
        near = wanted(machine, rows, stored, expert, place).rounded(torch.float32)
        assert near.holds(found[place])
        assert difference(found[place], near.center) < 1e-3
    if machine.is_emulated:
        assert is_untouched(found, groups)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    groups=any_groups(),
    depth=st.sampled_from(DEPTHS),
    width=st.sampled_from(WIDTHS),
    then=st.sampled_from([*FORMATS, None]),
    tiling=st.sampled_from([None, *GATE_UP_TILINGS]),
)
def test_gate_and_up_are_multiplied_gated_and_quantised_at_once(
    machine: Machine,
    groups: Groups,
    depth: int,
    width: int,
    then: ScaleFormat | None,
    tiling: Tiling | None,
) -> None:
    rows = fp8_rows(depth, groups, depth)
    stored = fp8_weight(width, groups, 2 * width, depth, 2)
    found = gate_up(machine, rows, stored, groups, then, tiling)
    for expert, place in places(groups):
        near = swiglu(wanted(machine, rows, stored, expert, place), machine)
        if then is None:
            assert near.rounded(BF16).holds(found.values[place])
        else:
            assert is_quantised(near, found, place, then)
            assert difference(dequantised(found, place), near.center) < 1e-3
    if machine.is_emulated:
        assert is_untouched(found.values, groups)
        assert found.scales is None or is_untouched(found.scales, groups)


def test_the_kind_of_the_gated_rows(machine: Machine) -> None:
    groups = groups_of([2])
    rows, stored = fp8_rows(1, groups, 128), fp8_weight(2, groups, 256, 128, 2)
    kinds = [gate_up(machine, rows, stored, groups, then).kind for then in (*FORMATS, None)]
    assert kinds == [Kind.FP8, Kind.FP8_UE8M0, Kind.PLAIN]
    scales = gate_up(machine, rows, stored, groups, FORMATS[0]).scales
    assert scales is not None
    assert scales.stride() == (1, 8)


@pytest.mark.parametrize("tiling", [*PRODUCT_TILINGS, NARROW], ids=tiling_name)
def test_groups_of_more_rows_than_a_tile(machine: Machine, tiling: Tiling) -> None:
    groups = groups_of([tiling.block_m + 3, tiling.block_m - 8])
    rows = fp8_rows(1, groups, 144)
    stored = fp8_weight(2, groups, 2 * 136, 144, 2)
    products = multiply(machine, rows, stored, groups, tiling=tiling)
    for expert, place in places(groups):
        near = wanted(machine, rows, stored, expert, place)
        assert near.rounded(torch.float32).holds(products[place])


@pytest.mark.parametrize("tiling", GATE_UP_TILINGS, ids=tiling_name)
def test_gated_groups_of_more_rows_than_a_tile(machine: Machine, tiling: Tiling) -> None:
    groups = groups_of([tiling.block_m + 3, tiling.block_m - 8])
    rows = fp8_rows(1, groups, 144)
    stored = fp8_weight(2, groups, 2 * 136, 144, 2)
    gated = gate_up(machine, rows, stored, groups, ScaleFormat.UE8M0, tiling)
    for expert, place in places(groups):
        near = swiglu(wanted(machine, rows, stored, expert, place), machine)
        assert is_quantised(near, gated, place, ScaleFormat.UE8M0)


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_a_projection_alone_is_one_group(machine: Machine, dtype: torch.dtype) -> None:
    groups = Groups.single(9, torch.device("cpu"))
    rows = fp8_rows(3, groups, 272)
    stored = fp8_weight(4, groups, 144, 272, 1)
    found = multiply(machine, rows, stored, groups, dtype)
    assert found.dtype is dtype
    assert wanted(machine, rows, stored, 0, slice(9)).rounded(dtype).holds(found)


def test_no_rows_at_all(machine: Machine) -> None:
    groups = Groups.single(0, torch.device("cpu"))
    rows, stored = fp8_rows(3, groups, 128), fp8_weight(4, groups, 256, 128, 2)
    assert multiply(machine, rows, stored, groups).shape == (0, 256)
    found = gate_up(machine, rows, stored, groups, ScaleFormat.FLOAT32)
    assert found.values.shape == (0, 128)
    assert found.scales is not None
    assert found.scales.shape == (0, 1)


def test_row_scales_of_other_strides(machine: Machine) -> None:
    """Rows that arrived from elsewhere have theirs row after row."""
    groups = groups_of([3, 5])
    rows = fp8_rows(5, groups, 272)
    assert rows.scales is not None
    stored = fp8_weight(6, groups, 128, 272, 1)
    row_major = replace(rows, scales=rows.scales.contiguous())
    assert torch.equal(
        multiply(machine, rows, stored, groups)[:8],
        multiply(machine, row_major, stored, groups)[:8],
    )


@pytest.mark.parametrize("large", ["weights", "rows"])
def test_more_than_two_billion_numbers(machine: Machine, large: str) -> None:
    """All but the last rows and the last expert are memory that nobody touches."""
    num_groups, num_rows, depth = (2**14 + 1, 8, 1024)
    if large == "rows":
        num_groups, num_rows, depth = (1, 2**17 + 3, 16384)
    counts = torch.zeros(num_groups, dtype=torch.int32)
    first_rows = torch.zeros(num_groups, dtype=torch.int32)
    counts[-1], first_rows[-1] = 3, num_rows - 3
    groups = Groups(first_rows=first_rows, counts=counts, num_rows=num_rows)
    small = groups_of([3])
    rows = fp8_rows(7, small, depth)
    stored = fp8_weight(8, small, 128, depth, 1)
    assert rows.scales is not None
    assert stored.scale is not None
    values = torch.empty(num_rows, depth, dtype=torch.float8_e4m3fn)
    scales = torch.empty(num_rows, depth // 128)
    weight = torch.empty(num_groups, 128, depth, dtype=torch.float8_e4m3fn)
    scale = torch.empty(num_groups, 1, depth // 128)
    assert max(values.numel(), weight.numel()) > 2**31
    values[-3:], scales[-3:] = rows.values[:3], rows.scales[:3]
    weight[-1], scale[-1] = stored.weight[0], stored.scale[0]
    found = multiply(
        machine,
        Rows(values=values, kind=Kind.FP8, scales=scales),
        replace(stored, weight=weight, scale=scale),
        groups,
        BF16,
    )
    near = wanted(machine, rows, stored, 0, slice(3)).rounded(BF16)
    assert near.holds(found[-3:])


def test_both_products_keep_to_deep_gemms_measure(machine: Machine) -> None:
    """Against float64 that does not quantise what is between them."""
    groups = groups_of([5, 0, 20], alignment=8)
    rows = fp8_rows(9, groups, 256)
    w13, w2 = fp8_weight(1, groups, 256, 256, 2), fp8_weight(2, groups, 256, 128, 1)
    gated = gate_up(machine, rows, w13, groups, ScaleFormat.FLOAT32)
    found = multiply(machine, gated, w2, groups, BF16)
    for expert, place in places(groups):
        first, second = (dequantise_weight(one, torch.float64)[expert] for one in (w13, w2))
        gate, up = (dequantised(rows, place) @ first.T).chunk(2, dim=1)
        center = F.silu(gate) * up @ second.T
        assert difference(found[place], center) < 1e-3
