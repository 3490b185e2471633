"""Schedules give every split of every row to one worker, and every worker finds its end."""

from __future__ import annotations

import random
from collections import Counter
from itertools import chain
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mortise.errors import StaleScheduleError
from mortise.reference.attention import plan_schedule
from mortise_cuda_common.emulator.deep_gemm import paged_schedule, paged_walk
from mortise_cuda_common.schedule import (
    Task,
    sm90_schedule,
    sm90_walk,
    sm100_schedule,
    sm100_walk,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Plan = Callable[[torch.Tensor, int], torch.Tensor]
    Walk = Callable[[torch.Tensor, torch.Tensor], Iterator[list[Task]]]

BATCHES = (1, 31, 32, 33, 64, 128)
LENGTHS = (1, 2, 63, 64, 255, 256, 257, 511, 512, 513, 1023)
NATIVE = {sm90_schedule: (1, 2), sm100_schedule: (1, 2, 4)}
"""Query rows of a request that each kernel takes."""

BOTH = pytest.mark.parametrize(
    ("plan", "walk"), [(sm90_schedule, sm90_walk), (sm100_schedule, sm100_walk)]
)


def tensor(lens: list[list[int]]) -> torch.Tensor:
    return torch.tensor(lens, dtype=torch.int32).view(len(lens), -1)


def random_lens(rng: random.Random, rows: int, next_n: int, most: int = 1500) -> torch.Tensor:
    """Lengths of rows that draft; short ones, long ones, and those at the edges of splits."""
    kind = rng.randrange(4)
    last = [
        max(next_n, 1 if kind == 0 else rng.choice([rng.randint(1, most), rng.choice(LENGTHS)]))
        for _ in range(rows)
    ]
    return tensor([list(range(length - next_n + 1, length + 1)) for length in last])


def every_task(lens: torch.Tensor) -> list[Task]:
    next_n = lens.shape[1]
    return [
        Task(row * next_n, split)
        for row, length in enumerate(lens[:, -1].tolist())
        for split in range(-(-length // 256))
    ]


def check(plan: Plan, walk: Walk, lens: torch.Tensor, num_workers: int) -> None:
    schedule = plan(lens, num_workers)
    assert schedule.shape == (num_workers + 1, 2)
    assert schedule.dtype is torch.int32
    assert schedule.is_contiguous()
    done = list(walk(schedule, lens))
    assert list(chain.from_iterable(done)) == every_task(lens)
    work = [len(tasks) for tasks in done]
    assert len(work) == num_workers
    assert max(work) - min(work) <= 1
    if plan is sm90_schedule:
        assert work == sorted(work), "the remainder goes to the last"
    elif lens.shape[1] == 1:
        assert work == sorted(work, reverse=True), "the remainder goes to the first"


@BOTH
def test_thousands_of_random_batches(plan: Plan, walk: Walk) -> None:
    rng = random.Random(20261122)
    sizes = Counter()
    for _ in range(3000):
        rows = rng.choice([*BATCHES, rng.randint(1, 40), rng.randint(1, 8)])
        next_n = rng.choice(NATIVE[plan])
        sizes[rows] += 1
        check(plan, walk, random_lens(rng, rows, next_n), rng.choice([132, rng.randint(1, 148)]))
    assert all(sizes[rows] > 100 for rows in BATCHES)


@BOTH
@settings(max_examples=60)
@given(st.data())
def test_any_batch(plan: Plan, walk: Walk, data: st.DataObject) -> None:
    next_n = data.draw(st.sampled_from(NATIVE[plan]))
    row = st.lists(st.integers(1, 3000), min_size=next_n, max_size=next_n).map(sorted)
    lens = data.draw(st.lists(row, min_size=1, max_size=12))
    check(plan, walk, tensor(lens), data.draw(st.integers(1, 148)))


@BOTH
@pytest.mark.parametrize("num_workers", [1, 2, 131, 132, 148])
def test_every_number_of_workers_and_none_to_do(plan: Plan, walk: Walk, num_workers: int) -> None:
    check(plan, walk, torch.ones(1, 1, dtype=torch.int32), num_workers)
    check(plan, walk, torch.full((3, 2), 70_000, dtype=torch.int32), num_workers)
    nothing = torch.empty(0, 1, dtype=torch.int32)
    assert not plan(nothing, num_workers).any()
    assert list(walk(plan(nothing, num_workers), nothing)) == [[]] * num_workers


@BOTH
@pytest.mark.parametrize("rows", BATCHES)
def test_the_shortest_rows_are_one_task_each(plan: Plan, walk: Walk, rows: int) -> None:
    check(plan, walk, torch.ones(rows, 1, dtype=torch.int32), 132)


@BOTH
def test_nothing_waits_for_the_device(plan: Plan, walk: Walk) -> None:
    """A meta tensor has no numbers that the host could look at."""
    lens = torch.ones(33, 2, dtype=torch.int32, device="meta")
    assert plan(lens, 132).shape == (133, 2)


def test_rows_of_three_tokens_are_two_tasks_on_sm90() -> None:
    lens = tensor([[298, 299, 300], [8, 9, 10]])
    done = sm90_walk(sm90_schedule(lens, 4), lens)
    assert list(done) == [[(0, 0)], [(0, 1)], [(2, 0), (2, 1)], [(3, 0), (5, 0)]]


def test_our_own_schedule_is_that_of_the_contract() -> None:
    """Of one query a row, and by code of the core that shares nothing with ours."""
    rng = random.Random(5)
    for _ in range(300):
        lens = random_lens(rng, rng.randint(1, 70), 1)
        workers = rng.randint(1, 148)
        assert torch.equal(sm90_schedule(lens, workers), plan_schedule(lens, workers))


@pytest.mark.parametrize("next_n", [1, 2, 3, 4])
def test_the_scalar_planners_of_the_emulator_agree(next_n: int) -> None:
    rng = random.Random(next_n)
    for _ in range(300):
        lens = random_lens(rng, rng.choice([*BATCHES, rng.randint(1, 9)]), next_n)
        last, workers = lens[:, -1].tolist(), rng.randint(1, 148)
        for plan, entries in (
            (sm90_schedule, paged_schedule.sm90_entries),
            (sm100_schedule, paged_schedule.sm100_entries),
        ):
            assert [tuple(entry) for entry in plan(lens, workers).tolist()] == entries(
                last, next_n, workers
            )


def emulated_tasks(schedule: torch.Tensor, lens: torch.Tensor, *, is_sm90: bool) -> list[Task]:
    """(First token of the request, split), as the emulator's own walks give them."""
    entries = [(first, second) for first, second in schedule.tolist()]
    last, next_n = lens[:, -1].tolist(), lens.shape[1]
    done = []
    for worker in range(len(entries) - 1):
        walked = (
            paged_walk.sm90_walk(entries, last, paged_schedule.num_atoms(next_n), worker)
            if is_sm90
            else paged_walk.sm100_walk(entries, last, next_n, 64, worker)
        )
        done += [
            Task(task.request * next_n, task.first_split + each)
            for task in walked
            for each in range(task.num_splits)
        ]
    return done


@pytest.mark.parametrize("is_sm90", [True, False])
@pytest.mark.parametrize("change", ["shorter", "longer", "either"])
def test_other_lengths_at_the_launch_never_hang(is_sm90: bool, change: str) -> None:
    """Both walks end, with the same tasks or both with an error; which one says the table."""
    plan, walk = (sm90_schedule, sm90_walk) if is_sm90 else (sm100_schedule, sm100_walk)
    rng, endless = random.Random(change), 0
    low, high = {"shorter": (-600, -1), "longer": (1, 600), "either": (-600, 600)}[change]
    for _ in range(150):
        lens = random_lens(rng, rng.randint(8, 40), 1, most=5000)
        other = lens + torch.tensor([[rng.randint(low, high)] for _ in lens], dtype=torch.int32)
        other.clamp_(min=1)
        schedule = plan(lens, 132)
        try:
            found: list[Task] | None = list(chain.from_iterable(walk(schedule, other)))
        except StaleScheduleError:
            found = None
        try:
            emulated: list[Task] | None = emulated_tasks(schedule, other, is_sm90=is_sm90)
        except RuntimeError:
            emulated = None
        assert found == emulated
        endless += found is None
    if change == "longer":
        assert endless == 0
    else:
        assert endless > 75, "a schedule of other lengths is the fault that this is about"


@BOTH
def test_an_endless_worker_is_named(plan: Plan, walk: Walk) -> None:
    schedule = plan(tensor([[2000], [2000]]), 4)
    with pytest.raises(StaleScheduleError, match=r"worker \d of a paged index launch over 2 rows"):
        list(walk(schedule, tensor([[100], [2000]])))
    if plan is sm90_schedule:
        with pytest.raises(StaleScheduleError, match="over 1 rows"):
            list(walk(schedule, tensor([[2000]])))
