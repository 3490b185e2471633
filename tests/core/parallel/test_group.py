"""Ranks find each other, agree, and are told by name who of them is lost."""

from __future__ import annotations

import socket
from threading import Event

import pytest
from tests.fixtures import rank_stories
from tests.fixtures.ranks import Outcome, Raised, launches, run_ranks

from mortise.env import Launch
from mortise.errors import RankDisagreementError, RankLostError
from mortise.parallel.agreement import agree
from mortise.parallel.collectives import all_gather_integers, all_gather_objects, from_first
from mortise.parallel.group import ExpertParallelGroup, join
from mortise.parallel.time_limit import in_time

PATIENCE = 30.0
"""Seconds within which a rank must have given up, far less than LONG, on any machine."""


def hosted(world_size: int) -> list[Launch]:
    """Launches without torchrun: rank 0 keeps the meeting point."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    return [
        Launch(
            rank=rank,
            world_size=world_size,
            local_rank=rank,
            master_addr="localhost",
            master_port=port,
        )
        for rank in range(world_size)
    ]


def lost(outcomes: list[Outcome | None], ranks: list[int]) -> list[str]:
    """The messages of ``ranks``, each of which gave up in time."""
    messages = []
    for rank in ranks:
        outcome = outcomes[rank]
        assert outcome is not None
        assert isinstance(outcome.result, Raised)
        assert outcome.result.kind == RankLostError.__name__, outcome.result.text
        assert outcome.seconds < PATIENCE
        messages.append(outcome.result.text)
    return messages


@pytest.mark.parametrize("is_hosted", [False, True], ids=["torchrun", "rank 0"])
def test_ranks_meet_exchange_and_meet_again(is_hosted: bool) -> None:
    if is_hosted:
        outcomes = run_ranks(rank_stories.meet_twice, hosted(3))
    else:
        with launches(3) as every:
            outcomes = run_ranks(rank_stories.meet_twice, every)
    for rank, outcome in enumerate(outcomes):
        assert outcome is not None
        assert outcome.result == [
            {
                "rank": rank,
                "world_size": 3,
                "integers": [(0, meeting), (1, 10 + meeting), (2, 20 + meeting)],
                "no integers": [(), (), ()],
                "largest": 3.0,
                "objects": [{"of": other, "text": "é" * other} for other in range(3)],
                "first": ["first"],
                "counts": [rank, 10 + rank, 20 + rank],
            }
            for meeting in range(2)
        ]


def test_every_rank_is_told_what_differs_and_where() -> None:
    with launches(3) as every:
        outcomes = run_ranks(rank_stories.disagree, every)
    for outcome in outcomes:
        assert outcome is not None
        assert outcome.result == Raised(
            RankDisagreementError.__name__,
            "3 processes disagree on dispatch.max_tokens_per_rank, dispatch.mode\n"
            "  dispatch.max_tokens_per_rank: 128 on ranks 0, 1; 64 on rank 2\n"
            '  dispatch.mode: "auto" on ranks 0, 2; (not set) on rank 1\n'
            "  expected: the same on every rank\n"
            "  remedy: start all processes with the same version, configuration and checkpoint",
        )


@pytest.mark.parametrize("is_hosted", [False, True], ids=["torchrun", "rank 0"])
def test_a_rank_that_dies_is_named_at_once(is_hosted: bool) -> None:
    """All wait up to 100 seconds, but a closed connection is noticed when it closes."""
    if is_hosted:
        outcomes = run_ranks(rank_stories.one_dies, hosted(4))
    else:
        with launches(4) as every:
            outcomes = run_ranks(rank_stories.one_dies, every)
    assert outcomes[1] is None
    for message in lost(outcomes, [0, 2, 3]):
        assert "lost contact during a later step" in message
        assert "no sign of life from rank 1\n" in message
        assert "within 100 s (parallel.timeout_seconds)" in message


def test_the_reason_of_a_rank_that_ended_is_told() -> None:
    with launches(3) as every:
        outcomes = run_ranks(rank_stories.one_raises, every)
    assert outcomes[1] is not None
    assert outcomes[1].result.kind == "CapacityError"
    for message in lost(outcomes, [0, 2]):
        reason = "rank 1 ended with CapacityError: 12 cache pages wanted, 3 of 8 free\n"
        assert reason in message


def test_a_rank_that_is_too_slow_is_named_when_the_time_is_over() -> None:
    with launches(3) as every:
        outcomes = run_ranks(rank_stories.one_is_too_slow, every)
    for message in lost(outcomes, [0, 2]):
        assert "no sign of life from rank 1\n" in message
        assert "within 1 s (parallel.timeout_seconds)" in message
    (message,) = lost(outcomes, [1])
    assert "ranks 0, 2 lost contact too" in message


def test_a_stopped_host_stops_nobody_else() -> None:
    outcomes = run_ranks(rank_stories.the_host_stops, hosted(2), stopped=[0])
    (message,) = lost(outcomes, [1])
    assert "rank 0 does not answer" in message


def test_a_rank_that_never_comes_is_named_by_all_others() -> None:
    with launches(3) as every:
        outcomes = run_ranks(rank_stories.meet_in_vain, every[:2])
    for message in lost(outcomes, [0, 1]):
        assert message.startswith("rank 2 of 3 did not come to localhost:")
        assert "every rank within 1 s (parallel.timeout_seconds)" in message


def test_a_host_that_never_comes_is_named() -> None:
    outcomes = run_ranks(rank_stories.meet_in_vain, hosted(2)[1:])
    (message,) = lost(outcomes, [0])
    assert message.startswith("rank 1 of 2 cannot reach rank 0 at localhost:")


def test_a_port_that_is_taken_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        launch = Launch(
            rank=0, world_size=2, local_rank=0, master_addr="localhost", master_port=port
        )
        (outcome,) = run_ranks(rank_stories.meet_in_vain, [launch])
    assert outcome is not None
    assert outcome.result.kind == "ParallelError"
    assert f"rank 0 cannot listen at localhost:{port}\n" in outcome.result.text
    assert "torchrun --master-port" in outcome.result.text


def test_a_second_default_group_is_refused() -> None:
    with launches(2) as every:
        outcomes = run_ranks(rank_stories.join_twice_at_once, every)
    for outcome in outcomes:
        assert outcome is not None
        assert outcome.result.kind == "ParallelError"
        assert "has a default group of torch.distributed already" in outcome.result.text


def test_one_process_needs_nobody() -> None:
    launch = Launch(rank=0, world_size=1, local_rank=0, master_addr="nowhere", master_port=1)
    with join(launch) as group:
        assert group == ExpertParallelGroup()
        assert group.process_group is None
        assert all_gather_integers(group, (1, 2)) == [(1, 2)]
        assert all_gather_objects(group, ("a", None)) == [["a", None]]
        assert from_first(group, "a") == "a"
        agree(group, {"version": "1"})


@pytest.mark.parametrize("error", [ValueError("wrong"), KeyboardInterrupt()])
def test_a_call_with_a_limit_passes_on_what_it_does(error: BaseException) -> None:
    def fail() -> None:
        raise error

    assert in_time(lambda: 3, 10.0) == 3
    with pytest.raises(type(error)):
        in_time(fail, 10.0)


def test_a_call_that_takes_too_long_is_left_behind() -> None:
    answer = Event()
    with pytest.raises(TimeoutError):
        in_time(answer.wait, 0.05)
    answer.set()
