"""Rows that are moved to where a kernel needs them come back to where they were."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mortise_cuda_common.arrangement import arrangement
from mortise_cuda_common.groups import Groups
from mortise_cuda_common.kernels.row_experts import row_experts
from mortise_cuda_common.programs.emulated import EmulatedPrograms
from mortise_cuda_common.rows import Kind, Rows

counts_of_groups = st.lists(st.integers(0, 9), min_size=1, max_size=6)


def groups_of(
    counts: list[int],
    alignment: int = 1,
    *,
    behind: int = 0,
    capacity: int | None = None,
    known: bool = False,
) -> Groups:
    padded = [-(-count // alignment) * alignment for count in counts]
    if capacity is not None:
        padded = [capacity] * len(counts)
    ends = np.cumsum(padded)
    return Groups(
        first_rows=torch.tensor(ends - padded, dtype=torch.int32),
        counts=torch.tensor(counts, dtype=torch.int32),
        num_rows=int(ends[-1]) + (0 if capacity is not None else behind),
        alignment=alignment,
        capacity=capacity,
        host_counts=tuple(counts) if known else None,
    )


def own_rows(groups: Groups) -> list[list[int]]:
    """Of each group the rows, by counting."""
    pairs = zip(groups.first_rows.tolist(), groups.counts.tolist(), strict=True)
    return [list(range(first, first + count)) for first, count in pairs]


@settings(deadline=None, max_examples=60)
@given(counts_of_groups, st.sampled_from([1, 4, 8]), st.integers(0, 5), st.booleans())
def test_the_expert_of_each_row(
    counts: list[int], alignment: int, behind: int, masked: bool
) -> None:
    groups = groups_of(counts, alignment, behind=behind, capacity=10 if masked else None)
    expected = [-1] * groups.num_rows
    for expert, rows in enumerate(own_rows(groups)):
        for row in rows:
            expected[row] = expert
    experts = row_experts(EmulatedPrograms(), groups)
    assert experts.dtype is torch.int32
    assert experts.tolist() == expected


@settings(deadline=None, max_examples=60)
@given(counts_of_groups, st.sampled_from([1, 2, 8]), st.sampled_from([3, 8, 16]), st.booleans())
def test_groups_are_moved_apart_and_back(
    counts: list[int], alignment: int, multiple: int, known: bool
) -> None:
    groups = groups_of(counts, alignment, behind=2, known=known)
    check_the_move(groups, multiple)


@settings(deadline=None, max_examples=30)
@given(counts_of_groups, st.integers(9, 12), st.sampled_from([5, 16]))
def test_slots_are_lengthened_and_shortened_again(
    counts: list[int], capacity: int, multiple: int
) -> None:
    check_the_move(groups_of(counts, capacity=capacity), multiple)


def check_the_move(groups: Groups, multiple: int) -> None:
    values = torch.arange(groups.num_rows * 2.0).reshape(-1, 2).to(torch.bfloat16)
    scales = torch.arange(groups.num_rows * 3.0).reshape(-1, 3)
    e4m3 = torch.arange(groups.num_rows, dtype=torch.uint8).unsqueeze(1).view(torch.float8_e4m3fn)
    move = arrangement(groups, multiple)
    held = groups.alignment if groups.capacity is None else groups.capacity
    assert (move is None) is (held % multiple == 0)
    if move is None:
        return
    moved = move.apply(Rows(values=values, kind=Kind.FP8, scales=scales))
    bytes_moved = move.apply(Rows(values=e4m3, kind=Kind.FP8)).values
    assert moved.scales is not None
    assert moved.values.shape[0] == move.groups.num_rows >= 1
    assert move.groups.num_rows % multiple == 0
    assert torch.equal(move.groups.counts, groups.counts)
    for before, after in zip(own_rows(groups), own_rows(move.groups), strict=True):
        assert not after or after[0] % multiple == 0
        assert torch.equal(moved.values[after], values[before])
        assert torch.equal(moved.scales[after], scales[before])
        as_bytes = bytes_moved.view(torch.uint8)[after]
        assert torch.equal(as_bytes, e4m3.view(torch.uint8)[before])
    back = move.undo(moved.values)
    assert back.shape == values.shape
    for rows in own_rows(groups):
        assert torch.equal(back[rows], values[rows])
    if groups.capacity is not None:
        assert move.groups.capacity == move.groups.num_rows // move.groups.num_groups


def test_gathered_scales_lie_column_by_column() -> None:
    groups = groups_of([3, 2])
    move = arrangement(groups, 8)
    assert move is not None
    scales = move.apply(
        Rows(values=torch.zeros(5, 2), kind=Kind.FP8, scales=torch.zeros(5, 3))
    ).scales
    assert scales is not None
    assert scales.stride() == (1, move.groups.num_rows)
