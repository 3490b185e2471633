"""A refreshed plan lives in the old storage, and the old description of it can no longer be run."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from mortise.errors import ContractError, StaleScheduleError
from mortise.reference.attention import paged_mqa_metadata
from mortise.spec.paged_mqa import PagedMQABuffers, PagedMQAMetadata, refresh_paged_mqa_metadata
from mortise.spec.roles import ForwardMode


def metadata(
    *lens: int, num_workers: int = 4, block_size: int = 64, mode: ForwardMode = ForwardMode.DECODE
) -> PagedMQAMetadata:
    context_lens = torch.tensor(lens, dtype=torch.int32).unsqueeze(1)
    return paged_mqa_metadata(context_lens, block_size, num_workers, mode)


def launch(record: PagedMQAMetadata) -> None:
    record.check_launch(record.rows, record.rows, record.rows * record.next_n)


def addresses(record: PagedMQAMetadata) -> tuple[int, int]:
    assert record.schedule is not None
    return record.context_lens.data_ptr(), record.schedule.data_ptr()


def test_the_storage_stays_and_holds_the_new_plan() -> None:
    stale, fresh = metadata(300, 10), metadata(700, 2000)
    kept, wanted = addresses(stale), fresh.schedule
    assert wanted is not None
    refreshed = refresh_paged_mqa_metadata(stale, fresh)
    assert addresses(refreshed) == kept
    assert refreshed.context_lens.flatten().tolist() == [700, 2000]
    assert torch.equal(refreshed.schedule, wanted)
    assert refreshed.max_context_len == 2000
    launch(refreshed)


def test_an_old_description_is_refused() -> None:
    first = metadata(300, 10)
    second = refresh_paged_mqa_metadata(first, metadata(301, 11))
    third = refresh_paged_mqa_metadata(second, metadata(302, 12))
    assert [record.generation for record in (first, second, third)] == [0, 1, 2]
    launch(third)
    for record in (first, second):
        with pytest.raises(StaleScheduleError, match="last refresh"):
            launch(record)


def test_refreshing_from_an_old_description_still_counts_up() -> None:
    first = metadata(300)
    refresh_paged_mqa_metadata(first, metadata(301))
    third = refresh_paged_mqa_metadata(first, metadata(302))
    assert third.generation == 2
    launch(third)


def test_the_fresh_plan_is_not_the_refreshed_one() -> None:
    """Another refresh of the old buffers must not reach into somebody else's."""
    stale, fresh = metadata(300), metadata(700)
    refresh_paged_mqa_metadata(stale, fresh)
    refresh_paged_mqa_metadata(stale, metadata(900))
    assert fresh.context_lens.item() == 700
    launch(fresh)


def with_planned_lens(record: PagedMQAMetadata) -> PagedMQAMetadata:
    """Planned lengths as a view of a buffer with one spare element."""
    lens = record.context_lens
    roomy = torch.full((lens.numel() + 1,), -7, dtype=torch.int32)
    planned = roomy[:-1].view(lens.shape).copy_(lens.clamp(min=1))
    buffers = PagedMQABuffers(lens, record.schedule, planned)
    return dataclasses.replace(record, buffers=buffers)


def test_planned_lengths_are_copied_in_place_and_nothing_behind_them() -> None:
    stale, fresh = with_planned_lens(metadata(300, 0)), with_planned_lens(metadata(0, 2000))
    kept = stale.planned_lens
    assert kept is not None
    refreshed = refresh_paged_mqa_metadata(stale, fresh)
    assert refreshed.planned_lens is kept
    assert kept.flatten().tolist() == [1, 2000]
    assert refreshed.context_lens.flatten().tolist() == [0, 2000]
    assert torch.as_strided(kept, (3,), (1,))[-1] == -7


def test_planned_lengths_are_optional_but_on_both_sides() -> None:
    assert metadata(300, 10).planned_lens is None
    plain, planned = metadata(300, 10), with_planned_lens(metadata(300, 10))
    for stale, fresh in ((plain, planned), (planned, plain)):
        with pytest.raises(ContractError, match="cannot refresh"):
            refresh_paged_mqa_metadata(stale, fresh)


@pytest.mark.parametrize(
    "other",
    [
        metadata(1, 2, 3),
        metadata(1, 2, num_workers=5),
        metadata(1, 2, block_size=32),
        metadata(1, 2, mode=ForwardMode.TARGET_VERIFY),
        metadata(1, 2, mode=ForwardMode.PREFILL),
        dataclasses.replace(
            metadata(1, 2), buffers=PagedMQABuffers(torch.ones(2, 1, dtype=torch.int32), None)
        ),
        paged_mqa_metadata(torch.ones(2, 2, dtype=torch.int32), 64, 4, ForwardMode.DECODE),
    ],
    ids=["rows", "workers", "block size", "mode", "prefill", "no schedule", "next_n"],
)
def test_another_shape_is_refused_and_leaves_everything_alone(other: PagedMQAMetadata) -> None:
    stale = metadata(300, 10)
    with pytest.raises(ContractError, match="cannot refresh"):
        refresh_paged_mqa_metadata(stale, other)
    assert stale.context_lens.flatten().tolist() == [300, 10]
    launch(stale)


@pytest.mark.parametrize("rows", [(1, 2, 2), (2, 1, 2), (2, 2, 1), (3, 3, 3)])
def test_rows_that_disagree_are_refused(rows: tuple[int, int, int]) -> None:
    with pytest.raises(ContractError, match="the same number of rows"):
        metadata(300, 10).check_launch(*rows)


def test_several_tokens_of_a_row_have_weights_each() -> None:
    record = paged_mqa_metadata(torch.ones(2, 3, dtype=torch.int32), 64, 4, ForwardMode.DECODE)
    record.check_launch(2, 2, 6)
    with pytest.raises(ContractError):
        record.check_launch(2, 2, 2)


def test_the_description_is_immutable() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        metadata(1).rows = 2  # type: ignore[misc]


def test_a_graph_is_not_replayed_for_longer_rows_than_it_was_captured_with() -> None:
    captured = metadata(300)
    longest = captured.max_context_len
    before = captured.context_lens.clone()
    with pytest.raises(
        ContractError, match="cannot replay what was captured for 300 keys"
    ) as caught:
        refresh_paged_mqa_metadata(captured, metadata(301), captured_context_len=longest)
    assert "capture again" in str(caught.value)
    assert torch.equal(captured.context_lens, before), "nothing was copied"
    shorter = refresh_paged_mqa_metadata(captured, metadata(11), captured_context_len=longest)
    again = refresh_paged_mqa_metadata(shorter, metadata(300), captured_context_len=longest)
    assert again.max_context_len == longest
