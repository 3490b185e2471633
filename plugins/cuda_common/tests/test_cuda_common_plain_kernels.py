"""Grouped products of bfloat16 rows by programs, judged by float64 and the errors of their sums."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plugins.cuda_common.tests.kernel_cases import (
    BF16,
    any_groups,
    groups_of,
    is_untouched,
    normal,
    places,
    poisoned,
    sums,
    swiglu,
    tiling_name,
)

from mortise.formats.weights import dequantise_weight, quantise_weight
from mortise.plugin import WeightScheme
from mortise_cuda_common.groups import Groups
from mortise_cuda_common.kernels import int4_grouped, plain_grouped
from mortise_cuda_common.kernels.int4_grouped import int4_gate_up, int4_product
from mortise_cuda_common.kernels.plain_grouped import (
    PRODUCT_TILINGS,
    plain_gate_up,
    plain_product,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from plugins.cuda_common.tests.kernel_cases import Machine

    from mortise.plugin import StoredWeight
    from mortise_cuda_common.kernels.tilings import Tiling

# A whole tile of columns, a part of one, several and a part.
DEPTHS = (64, 24, 136)
WIDTHS = (128, 40, 144)
GROUP_SIZES = (None, 8, 32, 64)


def error(machine: Machine, columns: int) -> float:
    return columns * machine.bf16_sums


def rows_for(groups: Groups, columns: int) -> torch.Tensor:
    return poisoned(normal(columns, groups.num_rows, columns), groups)


def weight_for(groups: Groups, rows: int, columns: int) -> torch.Tensor:
    return normal(rows, groups.num_groups, rows, columns, dtype=torch.float32) * columns**-0.5


def multiply_int4(
    machine: Machine,
    rows_RK: torch.Tensor,
    stored: StoredWeight,
    groups: Groups,
    tiling: Tiling | None = None,
    multiply: Callable[..., torch.Tensor] = int4_product,
) -> torch.Tensor:
    assert stored.scale is not None
    return multiply(
        machine.programs,
        machine.on(rows_RK),
        machine.on(stored.weight),
        machine.on(stored.scale),
        machine.groups(groups),
        torch.float32,
        tiling=tiling,
    ).cpu()


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    groups=any_groups(),
    depth=st.sampled_from(DEPTHS),
    width=st.sampled_from(WIDTHS),
    dtype=st.sampled_from([BF16, torch.float32]),
)
def test_each_group_is_multiplied_by_its_expert(
    machine: Machine, groups: Groups, depth: int, width: int, dtype: torch.dtype
) -> None:
    rows_RK, weight = rows_for(groups, depth), weight_for(groups, width, depth).to(BF16)
    found = plain_product(
        machine.programs, machine.on(rows_RK), machine.on(weight), machine.groups(groups), dtype
    ).cpu()
    assert found.dtype is dtype
    for expert, place in places(groups):
        near = sums(rows_RK[place], weight[expert], error(machine, depth))
        assert near.rounded(dtype).holds(found[place])
    if machine.is_emulated:
        assert is_untouched(found, groups)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(groups=any_groups(), depth=st.sampled_from(DEPTHS), width=st.sampled_from(WIDTHS))
def test_gate_and_up_are_multiplied_and_gated_at_once(
    machine: Machine, groups: Groups, depth: int, width: int
) -> None:
    rows_RK, w13 = rows_for(groups, depth), weight_for(groups, 2 * width, depth).to(BF16)
    found = plain_gate_up(
        machine.programs, machine.on(rows_RK), machine.on(w13), machine.groups(groups), BF16
    ).cpu()
    for expert, place in places(groups):
        products = sums(rows_RK[place], w13[expert], error(machine, depth))
        assert swiglu(products, machine).rounded(BF16).holds(found[place])
    if machine.is_emulated:
        assert is_untouched(found, groups)


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@settings(max_examples=6, deadline=None, derandomize=True)
@given(groups=any_groups(), blocks=st.sampled_from([1, 3]), width=st.sampled_from(WIDTHS))
def test_int4_gate_and_up_are_multiplied_and_gated_at_once(
    machine: Machine, groups: Groups, blocks: int, width: int, group_size: int | None
) -> None:
    depth = 64 * blocks if group_size == 64 else 32 * blocks
    rows_RK = rows_for(groups, depth)
    stored = quantise_weight(
        weight_for(groups, 2 * width, depth), WeightScheme.W4A16, group_size=group_size
    )
    found = multiply_int4(machine, rows_RK, stored, groups, multiply=int4_gate_up)
    weight = dequantise_weight(stored).to(BF16)
    for expert, place in places(groups):
        products = sums(rows_RK[place], weight[expert], error(machine, depth))
        assert swiglu(products, machine).rounded(torch.float32).holds(found[place])
    if machine.is_emulated:
        assert is_untouched(found, groups)


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@settings(max_examples=6, deadline=None, derandomize=True)
@given(groups=any_groups(), blocks=st.sampled_from([1, 3]), width=st.sampled_from(WIDTHS))
def test_int4_weights_are_rounded_to_bfloat16_once_and_multiplied(
    machine: Machine, groups: Groups, blocks: int, width: int, group_size: int | None
) -> None:
    depth = 64 * blocks if group_size == 64 else 32 * blocks
    rows_RK = rows_for(groups, depth)
    stored = quantise_weight(
        weight_for(groups, width, depth), WeightScheme.W4A16, group_size=group_size
    )
    found = multiply_int4(machine, rows_RK, stored, groups)
    weight = dequantise_weight(stored).to(BF16)
    for expert, place in places(groups):
        near = sums(rows_RK[place], weight[expert], error(machine, depth))
        assert near.rounded(torch.float32).holds(found[place])
    if machine.is_emulated:
        assert is_untouched(found, groups)


def test_every_int4_value(machine: Machine) -> None:
    """Minus eight too, which no quantiser of ours writes but checkpoints hold."""
    words = torch.tensor([0x76543210, 0xFEDCBA98 - 2**32]).to(torch.int32).repeat(2, 1)[None]
    rows_RK = torch.eye(16, dtype=BF16)
    found = int4_product(
        machine.programs,
        machine.on(rows_RK),
        machine.on(words),
        machine.on(torch.tensor([[[1.0], [0.5]]])),
        machine.groups(Groups.single(16, torch.device("cpu"))),
        torch.float32,
    ).cpu()
    values = torch.tensor([*range(8), *range(-8, 0)])
    assert torch.equal(found, torch.stack((values, values * 0.5), dim=1))


@pytest.mark.parametrize("tiling", [*PRODUCT_TILINGS, plain_grouped.NARROW], ids=tiling_name)
def test_groups_of_more_rows_than_a_tile(machine: Machine, tiling: Tiling) -> None:
    groups = groups_of([tiling.block_m + 3, tiling.block_m - 8])
    rows_RK, weight = rows_for(groups, 72), weight_for(groups, 2 * 136, 72).to(BF16)
    there = (machine.programs, machine.on(rows_RK), machine.on(weight), machine.groups(groups))
    products = plain_product(*there, torch.float32, tiling=tiling).cpu()
    gated = plain_gate_up(*there, torch.float32, tiling=tiling).cpu()
    for expert, place in places(groups):
        near = sums(rows_RK[place], weight[expert], error(machine, 72))
        assert near.rounded(torch.float32).holds(products[place])
        assert swiglu(near, machine).rounded(torch.float32).holds(gated[place])


@pytest.mark.parametrize("tiling", int4_grouped.GATE_UP_TILINGS, ids=tiling_name)
def test_gated_groups_of_more_rows_than_a_tile_times_int4(machine: Machine, tiling: Tiling) -> None:
    groups = groups_of([tiling.block_m + 3, tiling.block_m - 8])
    rows_RK = rows_for(groups, 72)
    stored = quantise_weight(weight_for(groups, 272, 72), WeightScheme.W4A16, group_size=24)
    found = multiply_int4(machine, rows_RK, stored, groups, tiling, int4_gate_up)
    weight = dequantise_weight(stored).to(BF16)
    for expert, place in places(groups):
        near = sums(rows_RK[place], weight[expert], error(machine, 72))
        assert swiglu(near, machine).rounded(torch.float32).holds(found[place])


@pytest.mark.parametrize("tiling", [*int4_grouped.TILINGS, int4_grouped.NARROW], ids=tiling_name)
def test_groups_of_more_rows_than_a_tile_times_int4(machine: Machine, tiling: Tiling) -> None:
    groups = groups_of([tiling.block_m + 3, tiling.block_m - 8])
    rows_RK = rows_for(groups, 72)
    stored = quantise_weight(weight_for(groups, 136, 72), WeightScheme.W4A16, group_size=24)
    found = multiply_int4(machine, rows_RK, stored, groups, tiling)
    weight = dequantise_weight(stored).to(BF16)
    for expert, place in places(groups):
        near = sums(rows_RK[place], weight[expert], error(machine, 72))
        assert near.rounded(torch.float32).holds(found[place])


def test_no_rows_at_all(machine: Machine) -> None:
    groups = machine.groups(Groups.single(0, torch.device("cpu")))
    rows_RK, weight = machine.on(normal(1, 0, 64)), machine.on(normal(2, 1, 80, 64))
    assert plain_product(machine.programs, rows_RK, weight, groups, BF16).shape == (0, 80)
    assert plain_gate_up(machine.programs, rows_RK, weight, groups, BF16).shape == (0, 40)


def test_columns_that_the_int4_program_takes() -> None:
    assert int4_grouped.takes_columns(128, 4)
    assert not int4_grouped.takes_columns(48, 4)
