"""A guess is made where it fits, and none where nothing does."""

from __future__ import annotations

import pytest
import torch

from mortise.recording.guesses import guess


def right() -> torch.Tensor:
    return torch.randn(6, 32, generator=torch.Generator().manual_seed(0)).bfloat16()


def with_row(place: int, value: float) -> torch.Tensor:
    rows = right()
    rows[place] = value
    return rows


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (with_row(5, 0.0), "row 5 is zeros, as if the last were never computed"),
        (with_row(2, 0.0), "row 2 is zeros"),
        (with_row(3, torch.nan), "row 3 is not finite"),
        (right() * 1.25, "the right answer times 1.25"),
        (-right(), "times -1"),
        (right().roll(1, dims=0), ""),
        (right().flip(1), ""),
        (torch.zeros(6, 32), "rows 0, 1, 2, 3, ... are zeros"),
    ],
)
def test_what_an_answer_looks_like(found: torch.Tensor, said: str) -> None:
    told = guess(right(), found)
    assert told.startswith(said) if said.startswith("row") else said in told
    assert bool(told) is bool(said)


def test_nothing_is_said_of_nothing() -> None:
    assert guess(torch.empty(0, 8), torch.empty(0, 8)) == ""
