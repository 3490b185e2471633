"""Rows of choices lie where a loop over experts, tokens and choices would put them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mortise.formats.arrangement import (
    Arrangement,
    arrange_choices,
    arrange_rows,
    in_layout,
    rows_of_choices,
    sum_choices,
)
from mortise.spec.dispatch import DispatchDtype, DispatchFormat, DispatchMode, RowLayout

NORMAL = DispatchFormat(dtype=DispatchDtype.FP32)
LOW_LATENCY = replace(NORMAL, mode=DispatchMode.LOW_LATENCY)


@dataclass(frozen=True)
class Choices:
    """Which experts each token names."""

    num_experts: int
    ids: list[list[int]]
    num_choices: int

    def tensor(self) -> torch.Tensor:
        return torch.tensor(self.ids, dtype=torch.int64).view(len(self.ids), self.num_choices)

    def tokens(self) -> torch.Tensor:
        """Rows that say which token they are."""
        return torch.arange(float(len(self.ids))).unsqueeze(1).expand(-1, 3).contiguous()

    def groups(self, *, once: bool) -> list[list[int]]:
        """Tokens that each expert gets, in order; a token ``once`` or as often as it names it."""
        found: list[list[int]] = [[] for _ in range(self.num_experts)]
        for expert in range(self.num_experts):
            for token, ids in enumerate(self.ids):
                times = ids.count(expert)
                found[expert] += [token] * (min(times, 1) if once else times)
        return found


@st.composite
def choices(draw: st.DrawFn) -> Choices:
    num_experts = draw(st.integers(1, 5))
    num_choices = draw(st.integers(1, 4))
    one_token = st.lists(
        st.integers(-1, num_experts - 1), min_size=num_choices, max_size=num_choices
    )
    return Choices(num_experts, draw(st.lists(one_token, max_size=8)), num_choices)


def groups_of(
    choices: Choices, arrangement: Arrangement, format: DispatchFormat
) -> list[list[float]]:
    """The first column of every expert's rows."""
    rows = arrange_rows(choices.tokens(), arrangement, poison=True)
    rows = in_layout(rows, format.row_layout, choices.num_experts)
    counts = arrangement.counts.tolist()
    if format.row_layout is RowLayout.MASKED:
        return [rows[expert, :count, 0].tolist() for expert, count in enumerate(counts)]
    found, start = [], 0
    alignment = format.alignment if format.row_layout is RowLayout.GROUPED_ALIGNED else 1
    for count in counts:
        found.append(rows[start : start + count, 0].tolist())
        padded = -(-count // alignment) * alignment
        assert rows[start + count : start + padded].isnan().all()
        start += padded
    assert rows[start:].isnan().all()
    return found


@given(choices(), st.integers(1, 5))
@settings(max_examples=40)
def test_as_many_rows_as_there_are_choices(choices: Choices, alignment: int) -> None:
    aligned = replace(NORMAL, row_layout=RowLayout.GROUPED_ALIGNED, alignment=alignment)
    expected = choices.groups(once=False)
    for row_format in (NORMAL, aligned):
        arrangement = arrange_choices(choices.tensor(), choices.num_experts, row_format)
        assert groups_of(choices, arrangement, row_format) == expected
        assert arrangement.group_counts == tuple(map(len, expected))
        padding = sum(-len(group) % row_format.alignment for group in expected)
        assert arrangement.num_rows == sum(map(len, expected)) + padding


@given(choices(), st.integers(0, 3), st.sampled_from(RowLayout))
@settings(max_examples=60)
def test_fixed_shapes_depend_on_the_capacity_alone(
    choices: Choices, spare: int, layout: RowLayout
) -> None:
    row_format = replace(LOW_LATENCY, row_layout=layout, alignment=3)
    capacity = len(choices.ids) + spare
    arrangement = arrange_choices(
        choices.tensor(), choices.num_experts, row_format, capacity=capacity
    )
    assert groups_of(choices, arrangement, row_format) == choices.groups(once=True)
    assert arrangement.group_counts is None
    none = torch.full((0, choices.num_choices), -1)
    empty = arrange_choices(none, choices.num_experts, row_format, capacity=capacity)
    assert empty.num_rows == arrangement.num_rows
    assert empty.counts.tolist() == [0] * choices.num_experts


@given(choices(), st.sampled_from(RowLayout), st.sampled_from(DispatchMode))
@settings(max_examples=60)
def test_every_choice_finds_the_row_of_its_expert(
    choices: Choices, layout: RowLayout, mode: DispatchMode
) -> None:
    """Experts that add a hundred times their number to what says which token it is."""
    row_format = replace(NORMAL, row_layout=layout, mode=mode, alignment=2)
    fixed = mode is DispatchMode.LOW_LATENCY or layout is RowLayout.MASKED
    capacity = len(choices.ids) if fixed else None
    arrangement = arrange_choices(
        choices.tensor(), choices.num_experts, row_format, capacity=capacity
    )
    rows = arrange_rows(choices.tokens(), arrangement, poison=True)
    for token, ids in enumerate(choices.ids):
        for choice, expert in enumerate(ids):
            slot = int(arrangement.slot_of_choice()[token, choice])
            assert (slot == arrangement.num_rows) is (expert < 0)
            if expert >= 0:
                assert rows[slot, 0] % 100 == token
                rows[slot] = token + 100 * expert
    chosen = rows_of_choices(rows, arrangement)
    expected = [
        [[token + 100.0 * expert if expert >= 0 else 0.0] * 3 for expert in ids]
        for token, ids in enumerate(choices.ids)
    ]
    assert chosen.tolist() == expected


@pytest.mark.parametrize("num_choices", [1, 2, 6, 8])
def test_a_sum_does_not_depend_on_the_tokens_beside_it(num_choices: int) -> None:
    generator = torch.Generator().manual_seed(num_choices)
    chosen = torch.randn(7, num_choices, 80, generator=generator)
    weights = torch.rand(7, num_choices, generator=generator)
    together = sum_choices(chosen, weights)
    for token in range(7):
        alone = sum_choices(chosen[token : token + 1], weights[token : token + 1])
        assert torch.equal(alone[0], together[token])


def test_a_poisoned_row_is_no_number_in_any_float_format() -> None:
    none = torch.full((1, 1), -1)
    row_format = replace(NORMAL, row_layout=RowLayout.MASKED)
    arrangement = arrange_choices(none, 1, row_format, capacity=2)
    for dtype in (torch.float32, torch.bfloat16, torch.float8_e4m3fn):
        rows = arrange_rows(torch.ones(1, 4).to(dtype), arrangement, poison=True)
        assert rows.dtype == dtype
        assert rows.float().isnan().all()


def test_unquantised_rows_keep_their_gradient() -> None:
    rows = torch.randn(3, 4, requires_grad=True)
    ids = torch.tensor([[0, 1], [1, -1], [1, 0]])
    arrangement = arrange_choices(ids, 2, NORMAL)
    arrange_rows(rows, arrangement, poison=False).sum().backward()
    assert rows.grad is not None
    assert rows.grad.tolist() == [[2.0] * 4, [1.0] * 4, [2.0] * 4]
