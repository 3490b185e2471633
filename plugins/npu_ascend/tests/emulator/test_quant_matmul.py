"""Products of quantised rows with one weight, and of floating-point rows with a quantised one."""

from __future__ import annotations

from typing import Any

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

M, K, N = 5, 48, 16
OLDER = (Generation.A2, Generation.A3)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
INT8, INT32, WORD = torch.int8, torch.int32, torch.int64

GENERATOR = np.random.default_rng(0)
X8 = GENERATOR.integers(-128, 128, (M, K)).astype(np.int8)
W8 = GENERATOR.integers(-128, 128, (K, N)).astype(np.int8)
X4 = GENERATOR.integers(-8, 8, (M, K))
W4 = GENERATOR.integers(-8, 8, (K, N))
ROW_SCALE = GENERATOR.uniform(1e-3, 1e-2, M).astype(np.float32)
SCALE = GENERATOR.uniform(1e-3, 1e-2, N).astype(np.float32)
INT_BIAS = GENERATOR.integers(-5000, 5000, N).astype(np.int32)
FLOAT_BIAS = GENERATOR.normal(size=N).astype(np.float32)
SUMS = X8.astype(np.int64) @ W8.astype(np.int64)


def to(dtype: torch.dtype, values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.float32)).to(dtype)


@pytest.fixture(params=Generation)
def npu(request: pytest.FixtureRequest) -> EmulatedNpu:
    return install(request.param)


def multiply(npu: EmulatedNpu, scale: Any = SCALE, **given: Any) -> torch.Tensor:
    arguments = {"x1": X8, "x2": W8, "scale": scale} | given
    return npu.npu_quant_matmul(
        **{
            name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value
            for name, value in arguments.items()
        }
    )


@pytest.mark.parametrize("is_words", [False, True])
def test_the_default_result_is_int8(npu: EmulatedNpu, is_words: bool) -> None:
    """By 19 bits of the scale, whether it came as a word or as float32."""
    scale = static_words(SCALE, np.zeros(N)) if is_words else SCALE
    result = multiply(npu, scale, bias=INT_BIAS)
    nine = np.clip(np.rint((SUMS + INT_BIAS).astype(np.float32) * nineteen(SCALE)), -256, 255)
    assert result.dtype == INT8
    np.testing.assert_array_equal(result, np.clip(nine, -128, 127))


@pytest.mark.parametrize("is_words", [False, True])
def test_an_offset_of_an_int8_result(npu: EmulatedNpu, is_words: bool) -> None:
    """In the word, or beside a float32 scale."""
    offset = GENERATOR.uniform(-30, 30, N).astype(np.float32)
    result = (
        multiply(npu, static_words(SCALE, offset))
        if is_words
        else multiply(npu, offset=offset, output_dtype=INT8)
    )
    nine = np.clip(np.rint(SUMS.astype(np.float32) * nineteen(SCALE)), -256, 255)
    np.testing.assert_array_equal(result, np.clip(nine + np.rint(offset), -128, 127))


def test_ties_go_to_the_even_integer(npu: EmulatedNpu) -> None:
    x = torch.tensor([[1], [3], [5], [-1], [-3]], dtype=INT8)
    result = npu.npu_quant_matmul(x, torch.ones(1, 8, dtype=INT8), torch.tensor([0.5]))
    assert result[:, 0].tolist() == [0, 2, 2, 0, -2]


@pytest.mark.parametrize("is_words", [False, True])
def test_fp16_without_scales_of_rows(npu: EmulatedNpu, is_words: bool) -> None:
    scale = static_words(SCALE, np.zeros(N)) if is_words else SCALE
    result = multiply(npu, scale, bias=INT_BIAS, output_dtype=FP16)
    expected = (SUMS + INT_BIAS).astype(np.float32) * nineteen(SCALE)
    np.testing.assert_array_equal(result, expected.astype(np.float16))


@pytest.mark.parametrize(
    ("dtype", "bias"),
    [(out, bias) for out in (BF16, FP16) for bias in (None, INT32, FP32, out)],
)
def test_scales_of_rows(npu: EmulatedNpu, dtype: torch.dtype, bias: torch.dtype | None) -> None:
    """An int32 bias before the scales, any other after them; one of 16 bits as the result is."""
    before = INT_BIAS if bias == INT32 else 0
    stored = torch.from_numpy(FLOAT_BIAS).to(bias) if bias not in (None, INT32) else None
    given = torch.from_numpy(INT_BIAS) if bias == INT32 else stored
    result = multiply(npu, pertoken_scale=ROW_SCALE, bias=given, output_dtype=dtype)
    expected = (SUMS + before).astype(np.float32) * SCALE * ROW_SCALE[:, None]
    expected = expected + (0 if stored is None else numpy_of(stored))
    np.testing.assert_array_equal(numpy_of(result), rounded(expected, dtype))


@pytest.mark.parametrize("scale_dtype", [FP32, BF16])
def test_bf16_without_scales_of_rows(npu: EmulatedNpu, scale_dtype: torch.dtype) -> None:
    scale = torch.from_numpy(SCALE).to(scale_dtype)
    result = multiply(npu, scale, bias=FLOAT_BIAS, output_dtype=BF16)
    expected = SUMS.astype(np.float32) * numpy_of(scale) + FLOAT_BIAS
    np.testing.assert_array_equal(numpy_of(result), rounded(expected, BF16))


def test_int32_is_the_sum_whatever_the_scale(npu: EmulatedNpu) -> None:
    result = multiply(npu, bias=INT_BIAS, output_dtype=INT32)
    np.testing.assert_array_equal(result, SUMS + INT_BIAS)


def test_one_scale_for_all_columns(npu: EmulatedNpu) -> None:
    result = multiply(npu, SCALE[:1], pertoken_scale=ROW_SCALE, output_dtype=BF16)
    expected = SUMS.astype(np.float32) * SCALE[0] * ROW_SCALE[:, None]
    np.testing.assert_array_equal(numpy_of(result), rounded(expected, BF16))


def test_batches_are_broadcast(npu: EmulatedNpu) -> None:
    x = GENERATOR.integers(-128, 128, (3, 2, M, K)).astype(np.int8)
    weight = GENERATOR.integers(-128, 128, (2, K, N)).astype(np.int8)
    result = multiply(npu, x1=x, x2=weight, output_dtype=INT32)
    np.testing.assert_array_equal(result, x.astype(np.int64) @ weight.astype(np.int64))


def test_a_bias_of_each_batch(npu: EmulatedNpu) -> None:
    weight = np.stack([W8, -np.maximum(W8, -127)])
    bias = np.stack([INT_BIAS, 2 * INT_BIAS])[:, None]
    result = multiply(npu, x2=weight, bias=bias, output_dtype=INT32)
    np.testing.assert_array_equal(result, X8.astype(np.int64) @ weight.astype(np.int64) + bias)


@pytest.mark.parametrize("transposed", [False, True])
def test_int4_operands(transposed: bool) -> None:
    """Words along N, or along K in a transposed view."""
    weight = packed(W4.T).T if transposed else packed(W4)
    sums = (X4 @ W4).astype(np.float32)
    for generation in OLDER:
        given = {"x1": packed(X4), "x2": weight, "output_dtype": BF16}
        result = multiply(install(generation), pertoken_scale=ROW_SCALE, **given)
        expected = sums * SCALE * ROW_SCALE[:, None]
        np.testing.assert_array_equal(numpy_of(result), rounded(expected, BF16))
    for generation in Generation:
        given = {"x1": packed(X4), "x2": weight, "output_dtype": FP16}
        result = multiply(install(generation), static_words(SCALE, np.zeros(N)), **given)
        np.testing.assert_array_equal(result, (sums * nineteen(SCALE)).astype(np.float16))


def test_a5_takes_int4_words_without_scales_of_rows_only() -> None:
    given = {"x1": packed(X4), "x2": packed(W4), "output_dtype": BF16}
    with pytest.raises(RuntimeError, match="DT_INT32, DT_INT32, DT_FLOAT are not supported"):
        multiply(install("A5"), pertoken_scale=ROW_SCALE, **given)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.integers(1, 70), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_sums_are_exact_in_every_shape(rows: int, inner: int, columns: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    x, weight = (
        generator.integers(-128, 128, shape).astype(np.int8)
        for shape in ((rows, inner), (inner, columns))
    )
    result = multiply(install(), SCALE[:1], x1=x, x2=weight, output_dtype=INT32)
    np.testing.assert_array_equal(result, x.astype(np.int64) @ weight.astype(np.int64))


ACCEPTED = {
    (False, WORD, INT8),
    (False, FP32, INT8),
    (False, WORD, FP16),
    (False, FP32, FP16),
    (False, FP32, BF16),
    (False, BF16, BF16),
    (False, FP32, INT32),
    (False, BF16, INT32),
    (True, FP32, BF16),
    (True, BF16, BF16),
    (True, FP32, FP16),
}
"""Scales of rows, dtype of the scale of columns, of the result: the manual's table for int8."""


@pytest.mark.parametrize("out", [INT8, FP16, BF16, INT32, FP32])
@pytest.mark.parametrize("scale", [WORD, FP32, BF16, FP16])
@pytest.mark.parametrize("by_row", [False, True])
def test_the_table_of_dtypes(
    npu: EmulatedNpu, by_row: bool, scale: torch.dtype, out: torch.dtype
) -> None:
    accepted = set(ACCEPTED)
    if npu.chip.generation is Generation.A5:
        accepted.add((False, WORD, BF16))
    given = {"pertoken_scale": ROW_SCALE if by_row else None, "output_dtype": out}
    if (by_row, scale, out) in accepted:
        assert multiply(npu, torch.ones(N).to(scale), **given).dtype == out
    else:
        with pytest.raises(RuntimeError, match="are not supported with output_dtype"):
            multiply(npu, torch.ones(N).to(scale), **given)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"x2": packed(W4)}, "DT_INT8, DT_INT32, DT_FLOAT are not supported"),
        ({"x1": torch.from_numpy(X8).bfloat16()}, "DT_BFLOAT16, DT_INT8, DT_FLOAT are not"),
        ({"x1": X8[0]}, "x1 dim num should be 2 ~ 6"),
        ({"x1": X8[:, :8]}, "k dim of x1 and x2 need be same"),
        ({"x1": X8[:0]}, "x1 must not be empty"),
        ({"scale": SCALE[:3]}, "the scale 1st dim value must be 1 or x2 n dim value"),
        ({"scale": SCALE[None]}, "the scale dim num must be 1"),
        ({"offset": SCALE, "output_dtype": BF16}, "offset is supported only where"),
        ({"offset": INT_BIAS}, "offset's type supported for float32"),
        (
            {"pertoken_scale": ROW_SCALE[:, None], "output_dtype": BF16},
            "the pertoken_scale dim num must be 1",
        ),
        ({"pertoken_scale": ROW_SCALE[:2], "output_dtype": BF16}, "of x1's m 5"),
        ({"bias": FLOAT_BIAS}, "bias dtype DT_FLOAT is not supported with output_dtype DT_INT8"),
        (
            {"bias": to(FP16, FLOAT_BIAS), "pertoken_scale": ROW_SCALE, "output_dtype": BF16},
            "bias dtype DT_FLOAT16 is not supported with output_dtype DT_BFLOAT16",
        ),
        ({"bias": INT_BIAS[:3]}, "bias_first_dim should be equal to x2 n dim"),
        ({"group_sizes": [1, 128, 128]}, "a product with groups of K is not emulated"),
        ({"x1_dtype": 296}, "is not emulated"),
    ],
)
def test_what_is_refused(npu: EmulatedNpu, given: dict[str, Any], words: str) -> None:
    with pytest.raises(RuntimeError, match="emulated Ascend") as caught:
        multiply(npu, **given)
    assert words in str(caught.value)


@pytest.mark.parametrize(("inner", "columns"), [(1, 32), (32, 1)])
def test_tiles_need_more_than_one_row_and_column(inner: int, columns: int) -> None:
    npu = install("A2")
    tiled = npu.npu_format_cast(torch.zeros(inner, columns, dtype=INT8), npu.Format.FRACTAL_NZ)
    given = {"x1": torch.zeros(2, inner, dtype=INT8), "scale": torch.ones(1)}
    with pytest.raises(RuntimeError, match="Not support mat2 n = 1 or k = 1 when foramt"):
        multiply(npu, x2=tiled, **given)
    multiply(npu, x2=tiled.clone(), **given)


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_the_longest_last_axis(npu: EmulatedNpu, dtype: torch.dtype) -> None:
    x = torch.zeros(1, 65536, dtype=INT8)
    with pytest.raises(RuntimeError, match="the last axis of x1 should be at most 65535"):
        multiply(npu, SCALE[:1], x1=x, x2=x.T, output_dtype=dtype, pertoken_scale=ROW_SCALE[:1])


def dequantised(values: np.ndarray, scale: np.ndarray, offset: Any, dtype: torch.dtype) -> Any:
    """(w + offset) * scale: fp16 rounds after both operations, bf16 once."""
    shifted = values.astype(np.float32) + offset
    return rounded(rounded(shifted, FP16 if dtype == FP16 else FP32) * scale, dtype)


SHAPES = [(1,), (1, 1), (N,), (1, N)]


@pytest.mark.parametrize("is_int4", [False, True])
@pytest.mark.parametrize("shape", [*SHAPES, (2, N)])
@pytest.mark.parametrize("has_offset", [False, True])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_weights_are_made_floating_point(
    npu: EmulatedNpu, dtype: torch.dtype, has_offset: bool, shape: tuple[int, ...], is_int4: bool
) -> None:
    """Per tensor, per column and per group, of which the last may be shorter."""
    size = 32 if shape == (2, N) else 0
    x = to(dtype, X8 / 64)
    scale, offset = (to(dtype, GENERATOR.uniform(0.1, 1, shape)) for _ in range(2))
    bias = to(FP32 if dtype == BF16 else FP16, FLOAT_BIAS)
    values = W4 if is_int4 else W8
    result = npu.npu_weight_quant_batchmatmul(
        x,
        packed(values) if is_int4 else torch.from_numpy(values),
        scale,
        offset if has_offset else None,
        bias=bias,
        antiquant_group_size=size,
    )

    def whole(tensor: torch.Tensor) -> np.ndarray:
        groups = numpy_of(tensor).reshape(-1, shape[-1])
        return np.repeat(groups, size or K, axis=0)[:K]

    weight = dequantised(values, whole(scale), whole(offset) if has_offset else 0, dtype)
    expected = numpy_of(x) @ weight + numpy_of(bias)
    tolerance = 8e-3 if dtype == BF16 else 1e-3
    assert result.dtype == dtype
    np.testing.assert_allclose(numpy_of(result), expected, rtol=tolerance, atol=tolerance)


def test_a_transposed_int4_weight(npu: EmulatedNpu) -> None:
    x, scale = to(FP16, X8 / 64), to(FP16, SCALE)
    plain = npu.npu_weight_quant_batchmatmul(x, packed(W4), scale)
    turned = npu.npu_weight_quant_batchmatmul(x, packed(W4.T).T, scale)
    torch.testing.assert_close(plain, turned)


@pytest.mark.parametrize("is_words", [False, True])
def test_the_result_quantised_again(npu: EmulatedNpu, is_words: bool) -> None:
    x, scale = to(FP16, X8 / 64), to(FP16, SCALE)
    steps = np.full(N, 2.0, np.float32)
    offset = np.full(N, 3.0, np.float32)
    result = npu.npu_weight_quant_batchmatmul(
        x,
        torch.from_numpy(W8),
        scale,
        None,
        static_words(steps, offset) if is_words else torch.from_numpy(steps),
        None if is_words else torch.from_numpy(offset),
    )
    exact = numpy_of(x) @ dequantised(W8, numpy_of(scale), 0, FP16)
    assert result.dtype == INT8
    expected = np.clip(np.rint(exact * 2 + 3), -128, 127)
    assert np.abs(result.numpy() - expected).max() <= 1


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"x": torch.from_numpy(X8)}, "x dtype DT_INT8 and weight dtype DT_INT8"),
        ({"weight": to(BF16, W8)}, "weight dtype DT_BFLOAT16 are not supported"),
        ({"antiquant_scale": to(FP16, SCALE)}, "antiquant_scale should be DT_BFLOAT16"),
        ({"antiquant_scale": to(BF16, SCALE[:3])}, "antiquant_scale should have one of the shapes"),
        ({"antiquant_offset": to(BF16, SCALE[:1])}, "should have the dtype and shape of"),
        ({"antiquant_group_size": 48}, "a multiple of 32 in [32, 47], got 48"),
        ({"antiquant_group_size": 16}, "a multiple of 32 in [32, 47], got 16"),
        ({"antiquant_group_size": 32}, "should have one of the shapes [(2, 16)]"),
        ({"bias": to(FP16, FLOAT_BIAS)}, "bias should be "),
        ({"x": to(BF16, X8[:, :8])}, "the K dim of x 8 and of weight 48"),
        ({"x": to(BF16, X8[:0])}, "no tensor empty"),
        ({"quant_scale": to(FP16, SCALE)}, "quant_scale should be DT_FLOAT or DT_INT64"),
        ({"quant_offset": to(FP32, SCALE)}, "quant_offset cannot exist without quant_scale"),
        ({"antiquant_scale": torch.ones(N, dtype=WORD)}, "words is not emulated"),
        ({"weight_dtype": 285}, "is not emulated"),
    ],
)
def test_what_a_weight_only_product_refuses(
    npu: EmulatedNpu, given: dict[str, Any], words: str
) -> None:
    arguments = {
        "x": to(BF16, X8),
        "weight": torch.from_numpy(W8),
        "antiquant_scale": to(BF16, SCALE),
    }
    with pytest.raises(RuntimeError, match="emulated Ascend") as caught:
        npu.npu_weight_quant_batchmatmul(**(arguments | given))
    assert words in str(caught.value)
