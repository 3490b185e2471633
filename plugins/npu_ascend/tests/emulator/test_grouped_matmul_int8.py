"""Grouped products of int8 rows with int8 weights, and of floating-point rows with integer ones."""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.fixtures.ascend_numbers import (
    nineteen,
    numpy_of,
    packed,
    rounded,
    static_words,
)

from mortise_npu_ascend.emulator import EmulatedNpu, Generation, install

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

E, K, N = 3, 32, 64
COUNTS = [2, 0, 3]
ROWS = sum(COUNTS)


@pytest.fixture(params=Generation)
def npu(request: pytest.FixtureRequest) -> EmulatedNpu:
    return install(request.param)


def random_int8(*shape: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(-128, 128, shape).astype(np.int8)


def random_scale(*shape: int, seed: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).uniform(1e-4, 1e-2, shape).astype(np.float32)


X = random_int8(ROWS, K, seed=0)
W = random_int8(E, K, N, seed=1)
ROW_SCALE = random_scale(ROWS, seed=2)
COLUMN_SCALE = random_scale(E, N, seed=3)
INT_BIAS = np.random.default_rng(4).integers(-5000, 5000, (E, N)).astype(np.int32)


def experts() -> Iterator[tuple[int, slice]]:
    for expert, (start, end) in enumerate(pairwise([0, *accumulate(COUNTS)])):
        yield expert, slice(start, end)


def of_each(part: Callable[[int, slice], np.ndarray]) -> np.ndarray:
    return np.concatenate([part(expert, rows) for expert, rows in experts()])


def sums(expert: int, rows: slice) -> np.ndarray:
    """The exact product."""
    return X[rows].astype(np.int64) @ W[expert].astype(np.int64)


def tensors(**arrays: np.ndarray | torch.Tensor) -> dict[str, list[torch.Tensor]]:
    return {
        name: [torch.from_numpy(value) if isinstance(value, np.ndarray) else value]
        for name, value in arrays.items()
    }


def grouped(npu: EmulatedNpu, x: Any, weight: Any, **arguments: Any) -> torch.Tensor:
    """All modes are called alike: counts, one result."""
    (result,) = npu.npu_grouped_matmul(
        [torch.as_tensor(x)],
        [torch.as_tensor(weight)],
        group_list=torch.tensor(COUNTS),
        split_item=2,
        group_type=0,
        group_list_type=1,
        **arguments,
    )
    return result


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scaled_rows_and_columns(npu: EmulatedNpu, dtype: torch.dtype, has_bias: bool) -> None:
    """(sum + bias) * column scale * row scale, in float32 in this order, rounded once."""
    scale = rounded(COLUMN_SCALE, dtype) if dtype == torch.bfloat16 else COLUMN_SCALE
    stored = torch.from_numpy(scale).to(torch.bfloat16 if dtype == torch.bfloat16 else torch.float)
    bias = tensors(bias=INT_BIAS) if has_bias else {}
    result = grouped(
        npu, X, W, output_dtype=dtype, **tensors(scale=stored, per_token_scale=ROW_SCALE), **bias
    )

    def expected(expert: int, rows: slice) -> np.ndarray:
        total = sums(expert, rows) + (INT_BIAS[expert] if has_bias else 0)
        scaled = total.astype(np.float32) * scale[expert] * ROW_SCALE[rows, None]
        return rounded(scaled, dtype)

    assert result.dtype == dtype
    np.testing.assert_array_equal(numpy_of(result), of_each(expected))


def test_a5_makes_bf16_of_float32_scales() -> None:
    arguments = tensors(scale=COLUMN_SCALE, per_token_scale=ROW_SCALE)
    result = grouped(install("A5"), X, W, output_dtype=torch.bfloat16, **arguments)
    expected = of_each(
        lambda e, rows: sums(e, rows).astype(np.float32) * COLUMN_SCALE[e] * ROW_SCALE[rows, None]
    )
    np.testing.assert_array_equal(numpy_of(result), rounded(expected, torch.bfloat16))


def test_a_float_bias_is_added_after_the_scales(npu: EmulatedNpu) -> None:
    scale = torch.from_numpy(COLUMN_SCALE).bfloat16()
    bias = torch.from_numpy(INT_BIAS / 1000).bfloat16()
    result = grouped(
        npu,
        X,
        W,
        output_dtype=torch.bfloat16,
        bias=[bias],
        **tensors(scale=scale, per_token_scale=ROW_SCALE),
    )
    expected = of_each(
        lambda e, rows: (
            sums(e, rows).astype(np.float32) * numpy_of(scale)[e] * ROW_SCALE[rows, None]
            + numpy_of(bias)[e]
        )
    )
    np.testing.assert_array_equal(numpy_of(result), rounded(expected, torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_without_a_scale_of_rows(npu: EmulatedNpu, dtype: torch.dtype) -> None:
    scale = torch.from_numpy(COLUMN_SCALE).to(
        torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    )
    result = grouped(npu, X, W, output_dtype=dtype, scale=[scale])
    expected = of_each(lambda e, rows: sums(e, rows).astype(np.float32) * numpy_of(scale)[e])
    np.testing.assert_array_equal(numpy_of(result), rounded(expected, dtype))


def test_the_sums_themselves(npu: EmulatedNpu) -> None:
    result = grouped(npu, X, W, output_dtype=torch.int32, **tensors(bias=INT_BIAS))
    assert result.dtype == torch.int32
    np.testing.assert_array_equal(result, of_each(lambda e, rows: sums(e, rows) + INT_BIAS[e]))


def test_the_default_result_is_int8_by_words(npu: EmulatedNpu) -> None:
    """Rounded to nine bits, shifted by the word's offset, saturated; only 19 bits of a scale."""
    offset = np.random.default_rng(7).integers(-40, 40, (E, N)).astype(np.float32)
    words = static_words(COLUMN_SCALE, offset)
    result = grouped(npu, X, W, scale=[words], **tensors(bias=INT_BIAS))

    def expected(expert: int, rows: slice) -> np.ndarray:
        total = (sums(expert, rows) + INT_BIAS[expert]).astype(np.float32)
        nine = np.clip(np.rint(total * nineteen(COLUMN_SCALE)[expert]), -256, 255)
        return np.clip(nine + offset[expert], -128, 127)

    assert result.dtype == torch.int8
    np.testing.assert_array_equal(result, of_each(expected))


def test_ties_go_to_the_even_integer(npu: EmulatedNpu) -> None:
    x = torch.tensor([[1], [3], [5], [-1], [-3]], dtype=torch.int8)
    weight = torch.ones(E, 1, 8, dtype=torch.int8)
    words = static_words(np.full((E, 8), 0.5, np.float32), np.zeros((E, 8)))
    result = grouped(npu, x, weight, scale=[words])
    assert result[:, 0].tolist() == [0, 2, 2, 0, -2]


def test_a5_also_scales_by_words() -> None:
    words = static_words(COLUMN_SCALE, np.zeros((E, N)))
    result = grouped(install("A5"), X, W, scale=[words], output_dtype=torch.bfloat16)
    expected = of_each(lambda e, r: sums(e, r).astype(np.float32) * nineteen(COLUMN_SCALE)[e])
    np.testing.assert_array_equal(numpy_of(result), rounded(expected, torch.bfloat16))


def relu(values: np.ndarray) -> np.ndarray:
    return np.maximum(values, 0)


def gelu_by_tanh(values: np.ndarray) -> np.ndarray:
    inner = np.sqrt(2 / np.pi) * (values + 0.044715 * values**3)
    return 0.5 * values * (1 + np.tanh(inner))


def fast_gelu(values: np.ndarray) -> np.ndarray:
    return values / (1 + np.exp(-1.702 * values))


def silu(values: np.ndarray) -> np.ndarray:
    return values / (1 + np.exp(-values))


@pytest.mark.parametrize(
    ("act_type", "function"), [(1, relu), (2, gelu_by_tanh), (4, fast_gelu), (5, silu)]
)
def test_activations(
    npu: EmulatedNpu, act_type: int, function: Callable[[np.ndarray], np.ndarray]
) -> None:
    arguments = tensors(scale=COLUMN_SCALE, per_token_scale=ROW_SCALE * 20)
    result = grouped(npu, X, W, output_dtype=torch.float16, act_type=act_type, **arguments)
    scaled = of_each(
        lambda e, r: sums(e, r).astype(np.float64) * COLUMN_SCALE[e] * ROW_SCALE[r, None] * 20
    )
    np.testing.assert_allclose(numpy_of(result), function(scaled), rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("generation", [Generation.A2, Generation.A3])
def test_older_chips_ignore_an_activation_they_lack(generation: Generation) -> None:
    npu = install(generation)
    with pytest.warns(RuntimeWarning, match=r"actType\[5\] is not supported"):
        result = grouped(npu, X, W, output_dtype=torch.int32, act_type=5)
    assert torch.equal(result, grouped(npu, X, W, output_dtype=torch.int32))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5), st.integers(1, 70), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_sums_are_exact_in_every_shape(rows: int, inner: int, columns: int, seed: int) -> None:
    x, weight = random_int8(rows, inner, seed=seed), random_int8(1, inner, columns, seed=seed + 1)
    (result,) = install().npu_grouped_matmul(
        [torch.from_numpy(x)],
        [torch.from_numpy(weight)],
        group_list=torch.tensor([rows]),
        split_item=2,
        group_type=0,
        output_dtype=torch.int32,
    )
    np.testing.assert_array_equal(result, x.astype(np.int64) @ weight[0].astype(np.int64))


def test_rows_behind_the_last_group_are_poison(npu: EmulatedNpu) -> None:
    x = torch.from_numpy(np.concatenate([X, X[:2]]))
    result = grouped(npu, x, W, output_dtype=torch.int32)
    assert (result[ROWS:] == torch.iinfo(torch.int32).min).all()
    words = static_words(COLUMN_SCALE, np.zeros((E, N)))
    assert (grouped(npu, x, W, scale=[words])[ROWS:] == -128).all()


def dequantised(
    values: np.ndarray, scale: np.ndarray, offset: np.ndarray | None, dtype: torch.dtype
) -> np.ndarray:
    """(w + offset) * scale: fp16 rounds after both operations, bf16 once."""
    shifted = values.astype(np.float32) + (0 if offset is None else offset)
    if dtype == torch.float16:
        shifted = rounded(shifted, dtype)
    return rounded(shifted * scale, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_int8_weights_become_floating_point(npu: EmulatedNpu, dtype: torch.dtype) -> None:
    x = torch.from_numpy(X / 64).to(dtype)
    scale, offset = (torch.from_numpy(random_scale(E, N, seed=s) * 100).to(dtype) for s in (8, 9))
    bias = torch.from_numpy(random_scale(E, N)).to(
        torch.float32 if dtype == torch.bfloat16 else torch.float16
    )
    result = grouped(npu, x, W, antiquant_scale=[scale], antiquant_offset=[offset], bias=[bias])
    expected = of_each(
        lambda e, rows: (
            numpy_of(x)[rows] @ dequantised(W[e], numpy_of(scale)[e], numpy_of(offset)[e], dtype)
            + numpy_of(bias)[e]
        )
    )
    assert result.dtype == dtype
    tolerance = 8e-3 if dtype == torch.bfloat16 else 1e-3
    np.testing.assert_allclose(numpy_of(result), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("groups", [None, 1, 2])
@pytest.mark.parametrize("has_offset", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_int4_weights_become_floating_point(
    npu: EmulatedNpu, dtype: torch.dtype, has_offset: bool, groups: int | None
) -> None:
    inner = 64
    x = torch.from_numpy(random_int8(ROWS, inner, seed=0) / 64).to(dtype)
    weight = np.random.default_rng(1).integers(-8, 8, (E, inner, N))
    shape = (E, N) if groups is None else (E, groups, N)
    scale, offset = (torch.from_numpy(random_scale(*shape, seed=s) * 100).to(dtype) for s in (8, 9))
    shift = {"antiquant_offset": [offset]} if has_offset else {}
    result = grouped(npu, x, packed(weight), antiquant_scale=[scale], **shift)

    def expected(expert: int, rows: slice) -> np.ndarray:
        def whole(tensor: torch.Tensor) -> np.ndarray:
            per_group = numpy_of(tensor)[expert].reshape(-1, N)
            return np.repeat(per_group, inner // len(per_group), axis=0)

        shift = whole(offset) if has_offset else None
        return numpy_of(x)[rows] @ dequantised(weight[expert], whole(scale), shift, dtype)

    tolerance = 8e-3 if dtype == torch.bfloat16 else 1e-3
    np.testing.assert_allclose(numpy_of(result), of_each(expected), rtol=tolerance, atol=tolerance)
