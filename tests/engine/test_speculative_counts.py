"""What drafting is said to have given is what was counted."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mortise.engine.speculative.statistics import DraftStatistics


def counted(num_tokens: int, steps: list[tuple[int, int]]) -> DraftStatistics:
    result = DraftStatistics.none(num_tokens)
    for num_drafted, num_accepted in steps:
        result = result.after(num_drafted, num_accepted)
    return result


def test_nothing_drafted_has_no_rate_and_no_length() -> None:
    nothing = DraftStatistics.none(3)
    assert nothing == DraftStatistics(steps=0, drafted=0, accepted_by_place=(0, 0, 0))
    assert nothing.accepted == 0
    assert nothing.acceptance_rate is None
    assert nothing.acceptance_length is None


def test_a_rejected_draft_still_gives_a_token() -> None:
    one = counted(3, [(3, 0)])
    assert (one.acceptance_rate, one.acceptance_length) == (0.0, 1.0)


def test_counts_of_some_steps() -> None:
    some = counted(3, [(3, 3), (3, 0), (3, 1), (3, 2)])
    assert some == DraftStatistics(steps=4, drafted=12, accepted_by_place=(3, 2, 1))
    assert some.accepted == 6
    assert some.acceptance_rate == 0.5
    assert some.acceptance_length == 2.5


def test_a_step_leaves_what_was_counted_before() -> None:
    before = counted(2, [(2, 1)])
    before.after(2, 2)
    assert before == DraftStatistics(steps=1, drafted=2, accepted_by_place=(1, 0))
    with pytest.raises(FrozenInstanceError):
        before.steps = 2  # type: ignore[misc]


def test_sums_over_requests_go_place_by_place() -> None:
    one, other = counted(2, [(2, 2), (2, 1)]), counted(2, [(2, 0)])
    expected = DraftStatistics(steps=3, drafted=6, accepted_by_place=(2, 1))
    assert one + other == expected
    assert sum([one, other], DraftStatistics.none(2)) == expected


def test_sums_of_different_numbers_of_drafts_have_the_places_of_the_longer() -> None:
    expected = DraftStatistics(steps=2, drafted=4, accepted_by_place=(2, 1, 1))
    assert counted(1, [(1, 1)]) + counted(3, [(3, 3)]) == expected
    assert counted(3, [(3, 3)]) + counted(1, [(1, 1)]) == expected


@given(st.lists(st.integers(0, 4), max_size=20), st.integers(0, 20))
def test_counts_are_those_of_every_step(accepted: list[int], cut: int) -> None:
    steps = [(4, count) for count in accepted]
    whole = counted(4, steps)
    assert counted(4, steps[:cut]) + counted(4, steps[cut:]) == whole
    assert (whole.steps, whole.drafted, whole.accepted) == (
        len(steps),
        4 * len(steps),
        sum(accepted),
    )
    assert list(whole.accepted_by_place) == sorted(whole.accepted_by_place, reverse=True)
    if steps:
        assert whole.acceptance_length == pytest.approx(1 + sum(accepted) / len(steps))
