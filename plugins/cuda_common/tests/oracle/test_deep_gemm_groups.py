"""Which rows are multiplied by which group's weight, beside the vendor's own scheduler."""

from __future__ import annotations

import random
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import pytest
import torch

from mortise_cuda_common.chip import EMULATED, Architecture
from mortise_cuda_common.emulator.deep_gemm.products import contiguous_rows, psum_rows
from mortise_cuda_common.emulator.deep_gemm.state import State

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

GROUPS: Final = 4
COLUMN_TILES: Final = 2
WARPGROUP: Final = 64
SECONDS: Final = 60

Owners = set[tuple[int, int]]
"""Row of the result, and group whose weight it is multiplied by."""


@dataclass(frozen=True)
class Question:
    """One grouped product: how its rows are told apart, and by which numbers."""

    kind: str
    block_rows: int
    num_sms: int
    rows: int
    numbers: tuple[int, ...]

    def line(self) -> str:
        words = [self.kind, self.block_rows, self.num_sms, self.rows, *self.numbers]
        return " ".join(map(str, words))

    def is_defined(self, row: int, group: int) -> bool:
        """Whether a row that is computed is anybody's."""
        if self.kind == "rows":
            return row < self.rows and self.numbers[row] >= 0
        if self.kind == "ends":
            return row < self.numbers[group]
        return row - group * self.rows < self.numbers[group]


def random_counts(chance: random.Random) -> list[int]:
    return [chance.choice((0, 1, 63, 64, 65, chance.randint(0, 300))) for _ in range(GROUPS)]


def aligned_rows(chance: random.Random, alignment: int) -> tuple[int, ...]:
    """As they should be, and sometimes not: then the first row of a tile speaks for the others."""
    numbers: list[int] = []
    for group, count in enumerate(random_counts(chance)):
        numbers += [-1] * chance.choice((0, 0, 0, 64, 3))
        numbers += [group] * count
        if chance.random() < 0.9:
            numbers += [-1] * (-len(numbers) % alignment)
    return tuple(numbers) or (-1,)


def ends_of(counts: list[int], alignment: int) -> tuple[int, ...]:
    ends, start = [], 0
    for count in counts:
        ends.append(start + count)
        start = -(-ends[-1] // alignment) * alignment
    return tuple(ends)


def questions() -> list[Question]:
    chance = random.Random(11)
    asked = []
    for number in range(150):
        block, sms = chance.choice((64, 128)), chance.choice((3, 132))
        kind = ("rows", "ends", "slots")[number % 3]
        if kind == "rows":
            numbers = aligned_rows(chance, block)
            asked.append(Question(kind, block, sms, len(numbers), numbers))
        elif kind == "ends":
            ends = ends_of(random_counts(chance), block)
            asked.append(Question(kind, block, sms, -(-max(*ends, 1) // block) * block, ends))
        else:
            counts = tuple(min(256, count) for count in random_counts(chance))
            asked.append(Question(kind, block, sms, 256, counts))
    return asked


def theirs(question: Question, line: str) -> Owners:
    """Every tile of rows comes once for each tile of columns."""
    words = [int(word) for word in line.split()]
    tiles = list(zip(words[::4], words[1::4], words[2::4], words[3::4], strict=True))
    assert all(tiles.count(tile) == COLUMN_TILES for tile in tiles)
    computed = {
        (row, group)
        for first, group, *flags in tiles
        for place, flag in enumerate(flags)
        if flag
        for row in range(first + place * WARPGROUP, first + (place + 1) * WARPGROUP)
    }
    return {(row, group) for row, group in computed if question.is_defined(row, group)}


def ours(question: Question) -> Owners:
    state = State(EMULATED[Architecture.SM90], question.num_sms, alignment=question.block_rows)
    numbers = torch.tensor(question.numbers, dtype=torch.int32)
    if question.kind == "slots":
        return {
            (group * question.rows + row, group)
            for group, count in enumerate(question.numbers)
            for row in range(count)
        }
    find = contiguous_rows if question.kind == "rows" else psum_rows
    return set(pairs(find(state, numbers)))


def pairs(found: Iterator[tuple[torch.Tensor, int]]) -> Iterator[tuple[int, int]]:
    for rows, group in found:
        for row in rows.tolist():
            yield row, group


def test_rows_are_multiplied_by_the_groups_that_the_vendor_takes(group_program: Path) -> None:
    asked = questions()
    outcome = subprocess.run(
        [group_program],
        input="".join(f"{question.line()}\n" for question in asked),
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=True,
    )
    answers = outcome.stdout.splitlines()
    assert len(answers) == len(asked)
    by_another, left_out = 0, 0
    for question, line in zip(asked, answers, strict=True):
        found = theirs(question, line)
        assert ours(question) == found, question
        if question.kind == "rows":
            by_another += any(question.numbers[row] != group for row, group in found)
            left_out += len(found) < sum(number >= 0 for number in question.numbers)
    assert by_another > 3, "the cases hardly try a tile of two groups"
    assert left_out > 0, "the cases do not try rows that are skipped with the first of their 64"


@pytest.mark.parametrize("kind", ["rows", "ends", "slots"])
def test_the_cases_have_rows(kind: str) -> None:
    assert sum(bool(ours(question)) for question in questions() if question.kind == kind) > 40
