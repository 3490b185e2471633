"""Means over windows of different size, and how sure they are."""

from __future__ import annotations

import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mortise.evaluation.estimate import Estimate


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=20), st.integers(1, 9))
def test_of_windows_of_one_size_it_is_the_standard_error_of_their_mean(
    means: list[float], size: int
) -> None:
    found = Estimate.per_token([mean * size for mean in means], [size] * len(means))
    expected = statistics.stdev(means) / len(means) ** 0.5
    assert found.mean == pytest.approx(statistics.fmean(means), abs=1e-9)
    assert found.standard_error == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_of_windows_of_different_sizes_it_is_what_resampling_them_gives() -> None:
    random = np.random.default_rng(0)
    sizes = random.integers(200, 1025, 150)
    sums = sizes * random.normal(2.0, 0.5, 150) + random.normal(0, 30, 150)
    found = Estimate.per_token(sums.tolist(), sizes.tolist())
    drawn = random.integers(0, 150, (4000, 150))
    resampled = sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)
    assert found.mean == pytest.approx(sums.sum() / sizes.sum())
    # The bootstrap itself is uncertain by 1/sqrt(2 * 4000), 1.1%.
    assert found.standard_error == pytest.approx(resampled.std(), rel=0.05)


def test_windows_without_tokens_of_interest_count_by_their_tokens() -> None:
    assert Estimate.per_token([3.0, 0.0], [3, 1]).mean == 0.75


def test_one_window_tells_no_error_and_equal_ones_tell_none() -> None:
    assert Estimate.per_token([6.0], [4]) == Estimate(1.5, None)
    assert Estimate.per_token([0.0, 0.0], [4, 7]) == Estimate(0.0, 0.0)
