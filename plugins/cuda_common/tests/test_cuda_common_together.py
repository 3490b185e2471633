"""Programs that are emulated at once leave what they leave when each runs alone, in their order."""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mortise_cuda_common.programs.apart import Apart
from mortise_cuda_common.programs.emulated import EmulatedPrograms
from mortise_cuda_common.programs.together import MOST_AT_ONCE, run_together

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

tl: Any = importlib.import_module("triton.language") if importlib.util.find_spec("triton") else None
PROGRAMS = EmulatedPrograms()


def both(
    source: Callable[..., None],
    grid: int,
    arguments: list[Any],
    constants: dict[str, Any],
) -> list[Any]:
    """What a launch leaves of its arguments, after it is found to be what single programs leave."""
    there, alone = (
        [one.clone() if isinstance(one, torch.Tensor) else one for one in arguments]
        for _ in range(2)
    )
    PROGRAMS.launch(source, grid, there, constants)
    for place in range(grid):
        PROGRAMS.run_one(source, place, grid, alone, constants)
    for one, other in zip(there, alone, strict=True):
        if isinstance(one, torch.Tensor):
            assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))
    return there


def ways(numbers, steps, out, wide, N: tl.constexpr) -> None:  # type: ignore[no-untyped-def]
    """Everything that numbers of a program can decide, and sums and products of each program."""
    place = tl.program_id(0)
    lanes = tl.arange(0, N)
    block = tl.load(numbers + place * N + lanes)
    step = tl.load(steps + place)
    if step < 0:
        return
    total = tl.sum(block, 0)
    for one in range(step):
        total += (one + place) * 0.5
    if (place % 3 == 1) & (step > 1):
        block = -block
    while step > 2:
        step -= 2
        block += step
    high = tl.maximum(step, place) - tl.minimum(place, 3)
    far = place.to(tl.int64) * wide // wide
    square = block[:, None] * block[None, :]
    square = tl.dot(square, tl.trans(square), tl.full((N, N), total, dtype=tl.float32))
    rows = out + far * (N * N + 2 * N)
    tl.store(rows + lanes[:, None] * N + lanes[None, :], square, mask=(lanes < high)[:, None])
    tl.store(rows + N * N + lanes, tl.where(high > 2, tl.cumsum(block, 0), total))
    tl.store(rows + N * N + N, abs(-place) / (step + 1), mask=place != 2)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(-1, 25), min_size=1, max_size=12), st.integers(0, 2**16))
def test_each_program_goes_its_way(steps: list[int], seed: int) -> None:
    numbers = torch.randn(len(steps), 16, generator=torch.Generator().manual_seed(seed))
    out = torch.full((len(steps), 16 * 16 + 32), -7.0)
    counts = torch.tensor(steps, dtype=torch.int32)
    both(ways, len(steps), [numbers, counts, out, 2**33], {"N": 16})


def next_to(numbers, N: tl.constexpr) -> None:  # type: ignore[no-untyped-def]
    lanes = (tl.program_id(0) + 1) * N + tl.arange(0, N)
    tl.store(numbers + lanes, tl.load(numbers + lanes - N) + tl.load(numbers + lanes))


def test_programs_that_read_what_others_write_run_in_their_order() -> None:
    """A chip promises no order; the emulation has always had this one."""
    (sums,) = both(next_to, 5, [torch.ones(6, 4)], {"N": 4})
    assert sums[:, 0].tolist() == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]


def shared(numbers, total, N: tl.constexpr) -> None:  # type: ignore[no-untyped-def]
    tl.store(total + tl.arange(0, N), tl.program_id(0))
    tl.atomic_add(numbers + tl.arange(0, N), tl.load(total + tl.arange(0, N)))


def last(total, N: tl.constexpr) -> None:  # type: ignore[no-untyped-def]
    tl.store(total + tl.arange(0, N), tl.program_id(0))


def test_programs_that_write_to_one_place_run_in_their_order() -> None:
    zeros = torch.zeros(4, dtype=torch.int32)
    sums, total = both(shared, 5, [zeros, zeros], {"N": 4})
    assert sums.tolist() == [10] * 4
    assert total.tolist() == [4] * 4
    assert both(last, 5, [zeros], {"N": 4})[0].tolist() == [4] * 4


def long(source, target, N: tl.constexpr) -> None:  # type: ignore[no-untyped-def]
    lanes = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(target + lanes, tl.load(source + lanes) * tl.program_id(0))


@pytest.mark.parametrize(("programs", "length"), [(MOST_AT_ONCE * 2 + 1, 1), (150, 2**13)])
def test_more_programs_than_run_at_once(programs: int, length: int) -> None:
    """Either because there are many, or because their blocks are long."""
    source = torch.arange(programs * length, dtype=torch.int64)
    target = torch.full_like(source, -1)
    PROGRAMS.launch(long, programs, [source, target], {"N": length})
    places = torch.arange(programs).repeat_interleave(length)
    assert torch.equal(target, source * places)


def uneven(source, target, N: tl.constexpr) -> None:  # type: ignore[no-untyped-def]
    lanes = tl.arange(0, N)
    number = tl.load(source + tl.program_id(0) * N + lanes)
    tl.store(target + tl.program_id(0) * N + lanes, number.to(tl.float8e4nv))


def test_what_one_of_many_programs_may_not_do_is_told_of_it() -> None:
    source = torch.ones(8, 4)
    target = torch.zeros(8, 4).to(torch.float8_e4m3fn)
    source[5] = 1000.0
    source[6] = 2000.0
    with pytest.raises(ValueError, match=r"1000\.0 is more than 448"):
        PROGRAMS.launch(uneven, 8, [source, target], {"N": 4})
    source[:] = 1.0
    with pytest.raises(IndexError, match="outside of a tensor of 28 numbers"):
        PROGRAMS.launch(uneven, 8, [source, target[:7]], {"N": 4})


def test_programs_part_by_what_they_are_told() -> None:
    groups: list[list[int]] = []

    def run(places: Sequence[int]) -> None:
        groups.append(list(places))
        labels = [place % 2 for place in places]
        if len(set(labels)) > 1:
            raise Apart(labels)

    run_together(run, range(5))
    assert groups == [[0, 1, 2, 3, 4], [0, 2, 4], [1, 3]]


def test_programs_that_part_without_end_run_alone() -> None:
    groups: list[list[int]] = []

    def run(places: Sequence[int]) -> None:
        groups.append(list(places))
        if len(places) > 1:
            raise Apart([int(place > places[0]) for place in places])

    run_together(run, range(40))
    alone = [group[0] for group in groups if len(group) == 1]
    assert alone == list(range(40))
    assert len(groups) < 60
