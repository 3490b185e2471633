"""The emulated schedule and walk, beside the vendor's own headers compiled for the host."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest
from plugins.cuda_common.tests.oracle.schedulers import Question

from mortise_cuda_common.emulator.deep_gemm.paged_schedule import (
    num_atoms,
    sm90_entries,
    sm100_entries,
)
from mortise_cuda_common.emulator.deep_gemm.paged_walk import sm90_walk, sm100_walk

if TYPE_CHECKING:
    from plugins.cuda_common.tests.oracle.schedulers import Answer, Schedulers, Tasks

HEADS = 64  # of the compiled program
LAUNCHES = ("equal", "shorter", "longer", "either")


def questions(arch: int) -> list[Question]:
    """Random lengths of many magnitudes, some launched with other ones than were planned."""
    chance = random.Random(arch)
    cases = []
    for number in range(80):
        next_n, num_sms = chance.randint(1, 3), chance.choice((5, 132))
        rows, longest = chance.randint(1, 40), chance.choice((300, 3000, 30000))
        planned = [chance.randint(1, longest) for _ in range(rows)]
        if number % 8 == 7:
            planned[chance.randrange(rows)] = 0
        kind = LAUNCHES[number % len(LAUNCHES)]
        low = {"equal": 0, "shorter": -600, "longer": 0, "either": -600}[kind]
        high = {"equal": 0, "shorter": 0, "longer": 600, "either": 600}[kind]
        launched = [max(1, length + chance.randint(low, high)) for length in planned]
        if kind == "equal":
            launched = planned
        cases.append(
            Question(arch, next_n, num_sms, *(_of_rows(x, next_n) for x in (planned, launched)))
        )
    return cases


def _of_rows(lens: list[int], next_n: int) -> tuple[tuple[int, ...], ...]:
    """The last query of a row sees all; what the others see must not matter to the schedule."""
    return tuple(
        (*(max(0, length - 1 - back) for back in range(next_n - 1)), length) for length in lens
    )


def ours(question: Question) -> tuple[list[tuple[int, int]], list[Tasks | None]]:
    planned = [row[-1] for row in question.planned]
    launched = [row[-1] for row in question.launched]
    entries_of = sm90_entries if question.arch == 90 else sm100_entries
    entries = entries_of(planned, question.next_n, question.num_sms)
    workers: list[Tasks | None] = []
    for sm in range(question.num_sms):
        walk = (
            sm90_walk(entries, launched, num_atoms(question.next_n), sm)
            if question.arch == 90
            else sm100_walk(entries, launched, question.next_n, HEADS, sm)
        )
        try:
            workers.append(tuple((x.request, x.first_split, x.num_splits) for x in walk))
        except RuntimeError:
            workers.append(None)
    return entries, workers


def splits(tasks: Tasks) -> set[tuple[int, int]]:
    return {(row, first + i) for row, first, count in tasks for i in range(count)}


@pytest.mark.parametrize("arch", [90, 100])
def test_plan_and_walk_are_the_vendors(schedulers: Schedulers, arch: int) -> None:
    asked = questions(arch)
    answers: list[Answer] = schedulers.ask(asked)
    assert len(answers) == len(asked)
    endless = 0
    for question, answer in zip(asked, answers, strict=True):
        entries, workers = ours(question)
        assert tuple(entries) == answer.plan, question
        for mine, theirs in zip(workers, answer.workers, strict=True):
            assert (mine is None) == (theirs is None), question
            if mine is not None and theirs is not None:
                # On Blackwell the vendor goes through splits once for each block of queries.
                assert mine == theirs if arch == 90 else splits(mine) == splits(theirs), question
        endless += None in workers
        if question.planned == question.launched:
            assert None not in workers
    assert endless > 5, "the cases hardly try what never ends"
