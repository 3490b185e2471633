"""Index keys in float8: the rule of the kernels that read them, and the matrix that turns them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from compressed_tensors.transform.utils.hadamard import deterministic_hadamard_matrix
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.fixtures.float_values import bytes_of

from mortise.formats.index_keys import hadamard, quantise_index_keys

CPU = torch.device("cpu")


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=30)
@given(
    seed=st.integers(0, 2**31 - 1),
    magnitude=st.sampled_from([0.0, 1e-9, 1e-4, 1.0, 3e4, 1e30]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_the_rule_is_that_of_the_kernels(seed: int, magnitude: float, dtype: torch.dtype) -> None:
    """``kv_cache_cast_to_fp8`` of DeepGEMM's tests, in numpy."""
    keys = (normal(seed, 5, 2, 24) * magnitude).to(dtype)
    values, scale = quantise_index_keys(keys)
    plain = keys.float().numpy()
    amax = np.maximum(np.abs(plain).max(axis=-1), np.float32(1e-4))
    wanted = amax / np.float32(448)
    np.testing.assert_array_equal(scale.numpy(), wanted)
    scaled = plain * (np.float32(1) / wanted)[..., None]
    assert scaled.dtype == np.float32
    cast = torch.from_numpy(scaled).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(bytes_of(values), bytes_of(cast))


def test_zeros_stay_zeros() -> None:
    values, scale = quantise_index_keys(torch.zeros(3, 8))
    assert not values.float().any()
    assert scale.tolist() == pytest.approx([1e-4 / 448] * 3)


def test_the_largest_magnitude_becomes_448() -> None:
    values, scale = quantise_index_keys(torch.tensor([[0.5, -7.0, 3.0]]))
    assert values.float().tolist()[0][1] == -448
    assert float(scale) == pytest.approx(7 / 448)


@pytest.mark.parametrize("size", [1, 2, 64, 128])
def test_the_matrix_is_sylvesters(size: int) -> None:
    wanted = deterministic_hadamard_matrix(size, torch.float32) / np.sqrt(size)
    torch.testing.assert_close(hadamard(size, CPU), wanted, atol=1e-7, rtol=0)


def test_turning_twice_is_turning_back() -> None:
    rows = normal(0, 7, 64)
    matrix = hadamard(64, CPU)
    torch.testing.assert_close(rows @ matrix @ matrix, rows)
