"""The indexer's schedule covers every unit of work exactly once, as evenly as can be."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from mortise.reference.attention import paged_mqa_metadata, plan_schedule
from mortise.spec.paged_mqa import SPLIT_TOKENS
from mortise.spec.roles import ForwardMode

lengths = st.lists(
    st.one_of(st.sampled_from([0, 1, 255, 256, 257, 512, 513]), st.integers(0, 3000)), max_size=40
)
workers = st.integers(1, 150)


def planned(context_lens: list[int], num_workers: int) -> list[tuple[int, int]]:
    lens = torch.tensor(context_lens, dtype=torch.int32).view(-1, 1)
    schedule = plan_schedule(lens, num_workers)
    assert schedule.dtype == torch.int32
    assert schedule.shape == (num_workers + 1, 2)
    return [tuple(entry) for entry in schedule.tolist()]


def units_of(length: int) -> int:
    return max(1, -(-length // 256))


def walk(
    context_lens: list[int], entries: list[tuple[int, int]], worker: int
) -> list[tuple[int, int]]:
    """What a kernel does: step unit by unit from the worker's entry until it meets the next."""
    cursor, done = entries[worker], []
    while cursor != entries[worker + 1]:
        row, unit = cursor
        assert row < len(context_lens), "the worker ran past its end: a hang on a device"
        done.append(cursor)
        cursor = (row, unit + 1) if unit + 1 < units_of(context_lens[row]) else (row + 1, 0)
    return done


def simulated(context_lens: list[int], num_workers: int) -> list[tuple[int, int]]:
    """The published planner, one worker after the other."""
    units = [units_of(length) for length in context_lens]
    share, rest = divmod(sum(units), num_workers)
    entries = []
    for worker in range(num_workers):
        start = worker * share + max(0, worker - (num_workers - rest))
        row = 0
        while row < len(units) and start >= units[row]:
            start -= units[row]
            row += 1
        entries.append((row, start))
    return [*entries, (len(units), 0)]


def test_a_unit_is_256_tokens() -> None:
    assert SPLIT_TOKENS == 256
    assert planned([256], 1) == planned([1], 1) == [(0, 0), (1, 0)]
    assert planned([257], 2) == [(0, 0), (0, 1), (1, 0)]


@given(lengths, workers)
def test_every_unit_is_done_once_and_in_order(context_lens: list[int], num_workers: int) -> None:
    entries = planned(context_lens, num_workers)
    done = [unit for worker in range(num_workers) for unit in walk(context_lens, entries, worker)]
    expected = [
        (row, unit) for row, length in enumerate(context_lens) for unit in range(units_of(length))
    ]
    assert done == expected


@given(lengths, workers)
def test_shares_differ_by_one_and_the_last_workers_have_more(
    context_lens: list[int], num_workers: int
) -> None:
    entries = planned(context_lens, num_workers)
    shares = [len(walk(context_lens, entries, worker)) for worker in range(num_workers)]
    assert max(shares) - min(shares) <= 1
    assert shares == sorted(shares)


@given(lengths, workers)
def test_it_is_the_published_plan(context_lens: list[int], num_workers: int) -> None:
    assert planned(context_lens, num_workers) == simulated(context_lens, num_workers)


@given(lengths, workers)
def test_a_zero_length_is_planned_as_one(context_lens: list[int], num_workers: int) -> None:
    assert planned(context_lens, num_workers) == planned(
        [max(length, 1) for length in context_lens], num_workers
    )


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=10), st.integers(1, 4), workers)
def test_every_token_of_a_row_is_work_of_its_own(
    context_lens: list[int], next_n: int, num_workers: int
) -> None:
    lens = torch.tensor(context_lens, dtype=torch.int32).unsqueeze(1).expand(-1, next_n)
    flat = [length for length in context_lens for _ in range(next_n)]
    schedule = plan_schedule(lens.contiguous(), num_workers)
    assert [tuple(entry) for entry in schedule.tolist()] == planned(flat, num_workers)


@given(lengths, workers)
def test_the_record_owns_true_lengths_beside_the_plan(
    context_lens: list[int], num_workers: int
) -> None:
    lens = torch.tensor(context_lens, dtype=torch.int32).view(-1, 1)
    metadata = paged_mqa_metadata(lens, 64, num_workers, ForwardMode.DECODE)
    assert metadata.context_lens.flatten().tolist() == context_lens
    assert metadata.max_context_len == max(context_lens, default=0)
    assert (metadata.rows, metadata.next_n, metadata.block_size) == (len(context_lens), 1, 64)
    if context_lens:
        lens.fill_(7)
        assert metadata.context_lens.flatten().tolist() == context_lens, "the caller's tensor"


def test_a_plan_is_made_in_the_modes_that_need_one() -> None:
    lens = torch.tensor([[300]], dtype=torch.int32)
    for mode in ForwardMode:
        metadata = paged_mqa_metadata(lens, 64, 4, mode)
        assert (metadata.schedule is not None) == mode.needs_schedule
        assert metadata.mode is mode
