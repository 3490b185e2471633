"""Asks the vendor's schedulers, compiled for the host, for plans and for what each worker does."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

SECONDS: Final = 60

Tasks = tuple[tuple[int, int, int], ...]
"""Request, first split, number of splits."""


@dataclass(frozen=True, slots=True)
class Question:
    """One plan and one launch.

    Args:
        arch: 90 or 100.
        next_n: 1 to 3.
        num_sms: 5 or 132.
        planned: lengths that are planned for, ``[rows][next_n]``.
        launched: lengths that the kernel then reads.
    """

    arch: int
    next_n: int
    num_sms: int
    planned: tuple[tuple[int, ...], ...]
    launched: tuple[tuple[int, ...], ...]

    def line(self) -> str:
        """As the program reads it."""
        lens = [length for rows in (self.planned, self.launched) for row in rows for length in row]
        return " ".join(map(str, [self.arch, self.next_n, self.num_sms, len(self.planned), *lens]))


@dataclass(frozen=True, slots=True)
class Answer:
    """What the vendor does: the plan, and each worker's tasks, or None for one that never ends."""

    plan: tuple[tuple[int, int], ...]
    workers: tuple[Tasks | None, ...]


class Schedulers:
    """The compiled program."""

    def __init__(self, program: Path) -> None:
        self._program = program

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """Answer many at once."""
        outcome = subprocess.run(
            [self._program],
            input="".join(f"{question.line()}\n" for question in questions),
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=True,
        )
        return [_answer(line) for line in outcome.stdout.splitlines()]


def _answer(line: str) -> Answer:
    plan, *workers = line.removeprefix("plan ").split("worker")
    entries = [int(word) for word in plan.split()]
    return Answer(
        plan=tuple(zip(entries[::2], entries[1::2], strict=True)),
        workers=tuple(_tasks(text.split()) for text in workers),
    )


def _tasks(words: list[str]) -> Tasks | None:
    if words == ["endless"]:
        return None
    numbers = [int(word) for word in words]
    return tuple(zip(numbers[::3], numbers[1::3], numbers[2::3], strict=True))
