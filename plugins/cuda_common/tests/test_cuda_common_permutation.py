"""Tokens brought to their experts by programs and back, judged by the core's arrangement."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plugins.cuda_common.tests.kernel_cases import (
    BF16,
    FORMATS,
    HALF,
    is_untouched,
    normal,
)

from mortise.formats.arrangement import arrange_choices, arrange_rows, rows_of_choices
from mortise.formats.fp8 import quantise_fp8_rows
from mortise.plugin import DispatchDtype, DispatchFormat, RowLayout
from mortise_cuda_common.kernels.permutation import RANK_BLOCKS, permute, unpermute
from mortise_cuda_common.rows import Kind

if TYPE_CHECKING:
    from plugins.cuda_common.tests.kernel_cases import Machine

    from mortise.formats.arrangement import Arrangement
    from mortise.plugin import ScaleFormat
    from mortise_cuda_common.kernels.permutation import Permuted


@st.composite
def any_choices(draw: st.DrawFn) -> tuple[torch.Tensor, int]:
    """Ids ``[T, K]``, some of no expert, and the number of experts."""
    num_experts = draw(st.integers(1, 6))
    num_choices = draw(st.integers(1, 5))
    row = st.lists(st.integers(-1, num_experts - 1), min_size=num_choices, max_size=num_choices)
    ids = draw(st.lists(row, max_size=12))
    return torch.tensor(ids, dtype=torch.int64).reshape(len(ids), num_choices), num_experts


def arrangement_of(ids: torch.Tensor, num_experts: int, alignment: int) -> Arrangement:
    aligned = DispatchFormat(
        dtype=DispatchDtype.BF16, row_layout=RowLayout.GROUPED_ALIGNED, alignment=alignment
    )
    return arrange_choices(ids, num_experts, aligned)


def permuted(
    machine: Machine,
    hidden_TH: torch.Tensor,
    ids: torch.Tensor,
    num_experts: int,
    alignment: int,
    scale_format: ScaleFormat | None = None,
) -> Permuted:
    return permute(
        machine.programs,
        machine.on(hidden_TH),
        machine.on(ids),
        num_experts,
        alignment,
        scale_format,
    )


def assert_same_bits(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert torch.equal(
        found.cpu().contiguous().view(torch.uint8), wanted.contiguous().view(torch.uint8)
    )


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    choices=any_choices(),
    alignment=st.sampled_from([1, 4, 128]),
    scale_format=st.sampled_from([None, *FORMATS]),
    width=st.sampled_from([8, 128, 200]),
    id_dtype=st.sampled_from([torch.int32, torch.int64]),
)
def test_rows_lie_as_the_core_arranges_them(
    machine: Machine,
    choices: tuple[torch.Tensor, int],
    alignment: int,
    scale_format: ScaleFormat | None,
    width: int,
    id_dtype: torch.dtype,
) -> None:
    ids, num_experts = choices
    hidden_TH = normal(width, ids.shape[0], width)
    arrangement = arrangement_of(ids, num_experts, alignment)
    found = permuted(machine, hidden_TH, ids.to(id_dtype), num_experts, alignment, scale_format)
    assert found.groups.alignment == alignment
    assert found.groups.num_rows == found.rows.values.shape[0] >= arrangement.num_rows
    counts = arrangement.counts
    padded = -(-counts // alignment) * alignment
    assert torch.equal(found.groups.counts.cpu(), counts.to(torch.int32))
    assert torch.equal(found.groups.first_rows.cpu(), (padded.cumsum(0) - padded).to(torch.int32))
    slots = arrangement.slot_of_choice()
    slots = torch.where(slots == arrangement.num_rows, -1, slots)
    assert torch.equal(found.row_of_TK.cpu(), slots.to(torch.int32))
    defined = slots[slots >= 0]
    if scale_format is None:
        assert found.rows.kind is Kind.PLAIN
        wanted = arrange_rows(hidden_TH, arrangement, poison=True)
        assert_same_bits(found.rows.values[defined], wanted[defined])
    else:
        values, scales = quantise_fp8_rows(hidden_TH, scale_format)
        assert found.rows.scales is not None
        wanted = arrange_rows(values, arrangement, poison=True)
        assert_same_bits(
            found.rows.values.view(torch.uint8)[defined], wanted.view(torch.uint8)[defined]
        )
        wanted = arrange_rows(scales, arrangement, poison=True)
        assert_same_bits(found.rows.scales[defined], wanted[defined])
    if machine.is_emulated:
        assert is_untouched(found.rows.values, found.groups)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(choices=any_choices(), dtype=st.sampled_from([BF16, torch.float32]))
def test_results_are_weighted_and_summed_in_float32(
    machine: Machine, choices: tuple[torch.Tensor, int], dtype: torch.dtype
) -> None:
    ids, num_experts = choices
    arrangement = arrangement_of(ids, num_experts, 4)
    there = permuted(machine, normal(1, ids.shape[0], 72), ids, num_experts, 4)
    rows_RH = normal(2, there.groups.num_rows, 72, dtype=dtype)
    unused = torch.ones(rows_RH.shape[0], dtype=torch.bool)
    unused[there.row_of_TK[there.row_of_TK >= 0].cpu()] = False
    rows_RH[unused] = float("nan")
    weights_TK = normal(3, *ids.shape, dtype=torch.float32)
    found = unpermute(
        machine.programs, machine.on(rows_RH), there.row_of_TK, machine.on(weights_TK)
    ).cpu()
    chosen_TKH = rows_of_choices(rows_RH, arrangement).double()
    terms_TKH = weights_TK.double()[:, :, None] * chosen_TKH
    center, magnitudes = terms_TKH.sum(dim=1), terms_TKH.abs().sum(dim=1)
    error = (ids.shape[1] + 1) * HALF[torch.float32] * magnitudes
    assert found.dtype is dtype
    assert (
        (found.double() - center).abs() <= (1 + HALF[dtype]) * error + HALF[dtype] * center.abs()
    ).all()


@pytest.mark.parametrize("outside", [-1, -7, 4, 1000])
def test_ids_of_no_local_expert_have_no_row(machine: Machine, outside: int) -> None:
    ids = torch.tensor([[0, outside, 3], [outside, outside, outside]])
    found = permuted(machine, normal(1, 2, 64), ids, 4, 1)
    assert found.row_of_TK.tolist() == [[0, -1, 1], [-1, -1, -1]]
    ones = torch.ones(ids.shape)
    results = unpermute(
        machine.programs, found.rows.values, found.row_of_TK, machine.on(ones)
    ).cpu()
    assert torch.equal(results[1], torch.zeros(64, dtype=BF16))


@pytest.mark.parametrize("block", RANK_BLOCKS)
def test_more_choices_than_a_program_looks_at_together(machine: Machine, block: int) -> None:
    generator = torch.Generator().manual_seed(block)
    ids = torch.randint(-1, 3, (block // 16 + 1, 16), generator=generator)
    hidden_TH = normal(1, ids.shape[0], 8)
    found = permuted(machine, hidden_TH, ids, 3, 8)
    arrangement = arrangement_of(ids, 3, 8)
    slots = arrangement.slot_of_choice().flatten()
    defined = slots[slots < arrangement.num_rows]
    assert torch.equal(found.row_of_TK.cpu().flatten()[ids.flatten() >= 0], defined.to(torch.int32))
    wanted = arrange_rows(hidden_TH, arrangement, poison=True)
    assert_same_bits(found.rows.values[defined], wanted[defined])


def test_rows_that_are_apart(machine: Machine) -> None:
    wide = machine.on(normal(4, 6, 512))
    ids = machine.on(torch.tensor([[0], [1], [0], [1], [0], [1]]))
    found = permute(machine.programs, wide[:, 128:256], ids, 2, 1, None)
    assert_same_bits(found.rows.values[:6], wide.cpu()[[0, 2, 4, 1, 3, 5], 128:256])
