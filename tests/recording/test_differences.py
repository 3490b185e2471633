"""Errors are what numpy says they are, and a factor in common is told from chance."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mortise.recording.allowances import COMMON_FACTOR, EXACT, Allowance
from mortise.recording.differences import difference

LENIENT = Allowance(whole=0.5, row=0.5, gain=COMMON_FACTOR)


def rows(seed: int, count: int = 32, columns: int = 48) -> torch.Tensor:
    return torch.randn(count, columns, generator=torch.Generator().manual_seed(seed))


@given(seed=st.integers(0, 1000), size=st.floats(1e-6, 10))
@settings(max_examples=25)
def test_errors_are_relative_norms(seed: int, size: float) -> None:
    expected = rows(seed)
    found = expected + size * rows(seed + 1)
    measured = difference(found, expected)
    right = expected.double().numpy()
    off = found.double().numpy() - right
    assert measured.whole == pytest.approx(np.linalg.norm(off) / np.linalg.norm(right))
    of_rows = np.linalg.norm(off, axis=1) / np.linalg.norm(right, axis=1)
    assert measured.row == pytest.approx(of_rows.max())
    assert measured.worst_row == of_rows.argmax()
    assert measured.max_abs == abs(off).max()
    assert measured.worst == np.unravel_index(abs(off).argmax(), off.shape)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_ulps_are_steps_between_representable_numbers(dtype: torch.dtype) -> None:
    one = torch.tensor([[1.0]], dtype=dtype)
    up = torch.nextafter(one, torch.tensor(2.0, dtype=dtype))
    down = torch.nextafter(one, torch.tensor(0.0, dtype=dtype))
    assert (difference(up, one).ulps, difference(down, up).ulps) == (1, 2)
    tiny = torch.nextafter(torch.zeros(1, 1, dtype=dtype), torch.tensor(1.0, dtype=dtype))
    assert difference(tiny, -tiny).ulps == 2


def test_what_is_not_finite_is_far_from_everything_but_its_equal() -> None:
    expected = rows(1)
    expected[3, 5] = torch.inf
    assert difference(expected, expected.clone()).is_none
    found = expected.clone()
    found[4, 6] = torch.nan
    measured = difference(found, expected)
    assert measured.whole == torch.inf
    assert (measured.worst_row, measured.worst) == (4, (4, 6))
    assert LENIENT.problem(measured)


def test_no_rows_differ_in_nothing() -> None:
    assert difference(torch.empty(0, 8), torch.empty(0, 8)).is_none


def test_columns_that_nobody_sees_do_not_count() -> None:
    expected, visible = rows(1), torch.arange(48) < 40
    found = expected.clone()
    found[:, 40:] = torch.nan
    assert difference(found, expected, visible.expand(32, 48)).is_none


@pytest.mark.parametrize("seed", range(20))
def test_a_factor_in_common_is_found_among_larger_errors(seed: int) -> None:
    """1 % too much, beside errors of 2 % that know nothing of each other."""
    expected = rows(seed, count=256)
    noise = 0.02 * rows(seed + 100, count=256) * expected.abs()
    assert not LENIENT.problem(difference(expected + noise, expected))
    problem = LENIENT.problem(difference(1.01 * expected + noise, expected))
    assert "larger by 1.0" in problem or "larger by 0.9" in problem


def test_rows_that_agree_by_chance_are_no_factor() -> None:
    """Whatever few rows have in common, or many that say the same, is no evidence."""
    few = rows(1, count=4)
    assert not LENIENT.problem(difference(1.02 * few, few))
    repeated = rows(1, count=4).repeat(100, 1)
    assert not LENIENT.problem(difference(1.02 * repeated, repeated))
    many = rows(1, count=64)
    assert LENIENT.problem(difference(1.02 * many, many))


def test_exact_means_to_the_bit() -> None:
    expected = rows(1).bfloat16()
    found = expected.clone()
    assert not EXACT.problem(difference(found, expected))
    found[7, 7] = torch.nextafter(found[7, 7], torch.tensor(9.0, dtype=torch.bfloat16))
    assert EXACT.problem(difference(found, expected))
