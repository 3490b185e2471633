"""Grouped products with int4 weights and quantised rows: halves, assist bias, fp16 in between."""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.fixtures.ascend_numbers import bits, nineteen, numpy_of, packed, rounded

from mortise_npu_ascend.emulator import EmulatedNpu, Generation, install

if TYPE_CHECKING:
    from collections.abc import Callable

E, K, N = 3, 512, 16
COUNTS = [2, 0, 3]
ROWS = sum(COUNTS)
SIXTEEN_BITS = (torch.bfloat16, torch.float16)

GENERATOR = np.random.default_rng(0)
X8 = GENERATOR.integers(-127, 128, (ROWS, K)).astype(np.int8)
X4 = GENERATOR.integers(-8, 8, (ROWS, K))
W4 = GENERATOR.integers(-8, 8, (E, K, N))
ROW_SCALE = GENERATOR.uniform(1e-3, 1e-2, ROWS).astype(np.float32)


@pytest.fixture(params=[Generation.A2, Generation.A3])
def npu(request: pytest.FixtureRequest) -> EmulatedNpu:
    """The generations with these kernels."""
    return install(request.param)


def column_scale(groups: int, largest: float = 0.02) -> np.ndarray:
    generator = np.random.default_rng(groups)
    return generator.uniform(largest / 4, largest, (E, groups, N)).astype(np.float32)


def assist_bias(weight: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """8 times the sum over K of weight times scale."""
    whole = np.repeat(scale, weight.shape[1] // scale.shape[1], axis=1)
    return (8.0 * (weight * whole.astype(np.float64)).sum(axis=1)).astype(np.float32)


def of_each(part: Callable[[int, slice], np.ndarray]) -> np.ndarray:
    spans = pairwise([0, *accumulate(COUNTS)])
    return np.concatenate([part(e, slice(start, end)) for e, (start, end) in enumerate(spans)])


def grouped(npu: EmulatedNpu, x: torch.Tensor, weight: torch.Tensor, **given: Any) -> torch.Tensor:
    arguments = {
        "group_list": torch.tensor(COUNTS),
        "group_list_type": 1,
        "split_item": 2,
        "group_type": 0,
        "output_dtype": torch.bfloat16,
        "per_token_scale": [torch.from_numpy(ROW_SCALE)],
    }
    (result,) = npu.npu_grouped_matmul([x], [weight], **(arguments | given))
    return result


def assisted(
    npu: EmulatedNpu, scale: np.ndarray, bias: np.ndarray, **arguments: Any
) -> torch.Tensor:
    """int8 rows with int4 weights."""
    return grouped(
        npu,
        torch.from_numpy(X8.copy()),
        packed(W4),
        scale=[bits(scale)],
        bias=[torch.from_numpy(bias)],
        **arguments,
    )


def sum_in_half(rows: np.ndarray, weight: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """The manual's order: per group an int32 sum times the scale as fp16, added in fp16."""
    total = np.zeros((len(rows), weight.shape[1]), np.float16)
    size = weight.shape[0] // len(scale)
    with np.errstate(over="ignore", invalid="ignore"):
        for group, factor in enumerate(scale):
            part = slice(group * size, (group + 1) * size)
            exact = rows[:, part].astype(np.int64) @ weight[part].astype(np.int64)
            total = total + (exact.astype(np.float32) * factor).astype(np.float16)
    return total.astype(np.float32)


def halves_of(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    wide = rows.astype(np.int64)
    return np.floor_divide(wide, 16), (wide & 15) - 8


def by_halves(expert: int, rows: slice, scale: np.ndarray, bias: np.ndarray) -> np.ndarray:
    upper, lower = (sum_in_half(half[rows], W4[expert], scale[expert]) for half in halves_of(X8))
    total = np.float32(16) * upper + lower + bias[expert]
    return total * ROW_SCALE[rows, None]


@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
@pytest.mark.parametrize("groups", [1, 2])
def test_int8_rows_per_channel_and_per_group(
    npu: EmulatedNpu, groups: int, dtype: torch.dtype
) -> None:
    scale = column_scale(groups)
    bias = assist_bias(W4, scale)
    result = assisted(npu, scale, bias, output_dtype=dtype)
    expected = of_each(lambda e, rows: by_halves(e, rows, scale, bias))
    np.testing.assert_array_equal(numpy_of(result), rounded(expected, dtype))
    exact = of_each(
        lambda e, rows: (
            (X8[rows].astype(np.float64) * ROW_SCALE[rows, None])
            @ (W4[e] * np.repeat(scale[e].astype(np.float64), K // groups, axis=0))
        )
    )
    # What it is for: fp16 between the groups, times 16, is the error that hardware has.
    np.testing.assert_allclose(numpy_of(result), exact, rtol=2e-2, atol=5e-2)


def test_a_wrong_bias_is_wrong_silently(npu: EmulatedNpu) -> None:
    """Of zeros: every result is off by 8 * sum(w * scale) * row scale, and nothing says so."""
    scale = column_scale(2)
    right = assist_bias(W4, scale)
    good, bad = (
        numpy_of(assisted(npu, scale, bias, output_dtype=torch.float16))
        for bias in (right, np.zeros_like(right))
    )
    off = of_each(lambda e, rows: right[e] * ROW_SCALE[rows, None])
    np.testing.assert_allclose(good - bad, off, rtol=2e-2, atol=1e-2)
    assert np.abs(off).max() > 0.1


def test_the_list_is_read_as_counts_whatever_is_said(npu: EmulatedNpu) -> None:
    scale = column_scale(1)
    bias = assist_bias(W4, scale)
    counted = assisted(npu, scale, bias)
    with pytest.warns(RuntimeWarning, match=r"groupListType 0 .* read as 1 \(count\)"):
        mistaken = assisted(npu, scale, bias, group_list_type=0)
    assert torch.equal(counted, mistaken)
    with pytest.warns(RuntimeWarning, match="groupListType"):
        ends = assisted(npu, scale, bias, group_list_type=0, group_list=torch.tensor([1, 1, 2]))
    assert ends[4].isnan().all()
    assert not ends[:4].isnan().any()


@pytest.mark.parametrize("strict", [False, True])
def test_a_strict_chip_overwrites_the_rows(strict: bool) -> None:
    """The int4 halves of each row, the upper one first; rows behind the last group stay."""
    x = torch.from_numpy(np.concatenate([X8, X8[:1]]))
    before = x.clone()
    scale = column_scale(2)
    arguments = {
        "scale": [bits(scale)],
        "bias": [torch.from_numpy(assist_bias(W4, scale))],
        "per_token_scale": [torch.ones(len(x))],
    }
    grouped(install("A2", strict=strict), x, packed(W4), **arguments)
    if not strict:
        assert torch.equal(x, before)
        return
    upper, lower = halves_of(X8)
    expected = torch.cat([packed(upper), packed(lower)], dim=1).view(torch.int8)
    assert torch.equal(x[:ROWS], expected)
    assert torch.equal(x[ROWS:], before[ROWS:])


def test_asymmetric_int4_weights(npu: EmulatedNpu) -> None:
    """(16 upper + lower + bias + row sum * offset) * row scale, where offset includes the scale."""
    scale = column_scale(1)
    bias = assist_bias(W4, scale)
    offset = np.random.default_rng(3).uniform(-0.05, 0.05, (E, 1, N)).astype(np.float32)
    result = assisted(
        npu,
        scale,
        bias,
        offset=[torch.from_numpy(offset)],
        per_token_scale=[torch.from_numpy(ROW_SCALE)[:, None]],
        output_dtype=torch.float16,
    )
    expected = of_each(
        lambda e, rows: (
            by_halves(e, rows, scale, bias)
            + X8[rows].astype(np.float64).sum(1, keepdims=True) * offset[e] * ROW_SCALE[rows, None]
        )
    )
    np.testing.assert_allclose(numpy_of(result), expected, rtol=2e-3, atol=1e-3)


def int4_expected(scale: np.ndarray, row_scale: np.ndarray | None) -> np.ndarray:
    def part(expert: int, rows: slice) -> np.ndarray:
        halves = sum_in_half(X4[rows], W4[expert], scale[expert].reshape(-1, N))
        return halves if row_scale is None else halves * row_scale[rows, None]

    return of_each(part)


@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
@pytest.mark.parametrize("groups", [None, 1, 4])
@pytest.mark.parametrize("has_rows", [True, False])
def test_int4_rows(
    npu: EmulatedNpu, groups: int | None, dtype: torch.dtype, has_rows: bool
) -> None:
    scale = column_scale(groups or 1)
    stored = bits(scale if groups else scale[:, 0])
    given = {} if has_rows else {"per_token_scale": None}
    result = grouped(npu, packed(X4), packed(W4), scale=[stored], output_dtype=dtype, **given)
    expected = int4_expected(scale, ROW_SCALE if has_rows else None)
    np.testing.assert_array_equal(numpy_of(result), rounded(expected, dtype))


def test_all_kinds_of_lists_are_read(npu: EmulatedNpu) -> None:
    stored = bits(column_scale(1))
    lists = (
        torch.tensor(COUNTS).cumsum(0),
        torch.tensor(COUNTS),
        torch.tensor([[0, 2], [2, 3], [1, 0]]),
    )
    results = [
        grouped(
            npu, packed(X4), packed(W4), scale=[stored], group_list=listed, group_list_type=kind
        )
        for kind, listed in enumerate(lists)
    ]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_sums_overflow_fp16_before_the_small_scale_of_the_row(npu: EmulatedNpu) -> None:
    """512 products of 7 * 7 at scale 4 are 100352 > 65504; the row's scale would bring 0.1 back."""
    x, weight = np.full((ROWS, K), 7), np.full((E, K, N), 7)
    row_scale = [torch.full((ROWS,), 1e-6)]

    def value(scale: float) -> float:
        stored = bits(np.full((E, N), scale, np.float32))
        result = grouped(npu, packed(x), packed(weight), scale=[stored], per_token_scale=row_scale)
        return result[0, 0].item()

    assert value(4.0) == np.inf
    assert value(2.0) == pytest.approx(512 * 49 * 2 * 1e-6, rel=8e-3)


@pytest.mark.parametrize("strict", [False, True])
def test_a_strict_chip_uses_nineteen_bits_of_a_scale(strict: bool) -> None:
    scale = np.full((E, 1, N), 1.0 + 2.0**-11, np.float32)
    x, weight = np.zeros((ROWS, K), int), np.zeros((E, K, N), int)
    x[:, 0], weight[:, 0] = 7, 7
    result = grouped(
        install("A2", strict=strict),
        packed(x),
        packed(weight),
        scale=[bits(scale)],
        per_token_scale=[torch.ones(ROWS)],
        output_dtype=torch.float16,
    )
    used = nineteen(scale) if strict else scale
    assert result[0, 0].item() == np.float16(np.float32(49) * used[0, 0, 0])
    assert (result[0, 0].item() == 49.0) is strict


@pytest.mark.parametrize("tiled", [False, True])
def test_tiles_do_not_change_int4(tiled: bool) -> None:
    npu = install("A2")
    weight = np.random.default_rng(5).integers(-8, 8, (E, K, 64))
    scale = bits(np.full((E, 64), 0.01, np.float32))
    stored = packed(weight)
    if tiled:
        as_bytes = npu.npu_format_cast(stored.view(torch.int8), npu.Format.FRACTAL_NZ)
        stored = as_bytes.view(torch.int32)
        assert npu.get_npu_format(stored) == npu.Format.FRACTAL_NZ
    result = grouped(npu, packed(X4), stored, scale=[scale])
    expected = of_each(
        lambda e, rows: (
            sum_in_half(X4[rows], weight[e], np.full((1, 64), 0.01, np.float32))
            * ROW_SCALE[rows, None]
        )
    )
    np.testing.assert_array_equal(numpy_of(result), rounded(expected, torch.bfloat16))


def test_transposed_int4_is_packed_along_the_inner_axis() -> None:
    npu = install("A2")
    stored = npu.npu_format_cast(packed(W4.transpose(0, 2, 1)), npu.Format.FRACTAL_NZ).mT
    assert stored.shape == (E, K // 8, N)
    result = grouped(npu, packed(X4), stored, scale=[bits(column_scale(2))])
    expected = rounded(int4_expected(column_scale(2), ROW_SCALE), torch.bfloat16)
    np.testing.assert_array_equal(numpy_of(result), expected)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 6),
    st.sampled_from([8, 16, 40]),
    st.sampled_from([8, 24]),
    st.integers(0, 2**32 - 1),
)
def test_int4_shapes(rows: int, inner: int, columns: int, seed: int) -> None:
    """All sixteen values, at every place of a word, in both operands."""
    generator = np.random.default_rng(seed)
    x, weight = (generator.integers(-8, 8, shape) for shape in ((rows, inner), (1, inner, columns)))
    (result,) = install().npu_grouped_matmul(
        [packed(x)],
        [packed(weight)],
        scale=[bits(np.full((1, columns), 0.125, np.float32))],
        group_list=torch.tensor([rows]),
        split_item=2,
        group_type=0,
        output_dtype=torch.float16,
    )
    expected = (x @ weight[0]) * 0.125
    np.testing.assert_array_equal(result, expected.astype(np.float16))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_the_two_halves_are_the_product_of_the_row(seed: int) -> None:
    """16 upper + lower + 8 sum(w * s) == s * (x . w), where nothing rounds."""
    generator = np.random.default_rng(seed)
    x = generator.integers(-128, 128, (2, 16)).astype(np.int8)
    weight = generator.integers(-8, 8, (1, 16, 8))
    scale = np.full((1, 1, 8), 0.5, np.float32)
    (result,) = install().npu_grouped_matmul(
        [torch.from_numpy(x)],
        [packed(weight)],
        scale=[bits(scale)],
        bias=[torch.from_numpy(assist_bias(weight, scale))],
        per_token_scale=[torch.ones(2)],
        group_list=torch.tensor([2]),
        group_list_type=1,
        split_item=2,
        group_type=0,
        output_dtype=torch.float16,
    )
    expected = 0.5 * (x.astype(np.int64) @ weight[0])
    np.testing.assert_array_equal(result, expected.astype(np.float16))


@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
@pytest.mark.parametrize("has_bias", [False, True])
def test_a5_makes_int4_weights_int8_first(dtype: torch.dtype, has_bias: bool) -> None:
    """rint(w * fp16 scale of the group) as int8, then as with int8 weights, without assist bias."""
    npu = install("A5")
    npu.config.allow_internal_format = True
    columns, groups = 64, 2
    generator = np.random.default_rng(9)
    weight = generator.integers(-8, 8, (E, K, columns))
    of_groups = generator.uniform(0.5, 15, (E, groups, columns)).astype(np.float16)
    of_columns = generator.uniform(1e-3, 1e-2, (E, columns)).astype(np.float32)
    bias = generator.normal(size=(E, columns)).astype(np.float32)
    tiled = npu.npu_format_cast(packed(weight).view(torch.int8), npu.Format.FRACTAL_NZ)
    result = grouped(
        npu,
        torch.from_numpy(X8),
        tiled.view(torch.int32),
        antiquant_scale=[torch.from_numpy(of_groups)],
        scale=[torch.from_numpy(of_columns)],
        bias=[torch.from_numpy(bias)] if has_bias else None,
        output_dtype=dtype,
    )

    def expected(expert: int, rows: slice) -> np.ndarray:
        whole = np.repeat(of_groups[expert], K // groups, axis=0)
        int8 = np.rint(weight[expert].astype(np.float16) * whole).astype(np.int64)
        scaled = (X8[rows].astype(np.int64) @ int8).astype(np.float32) * of_columns[expert]
        return scaled * ROW_SCALE[rows, None] + (bias[expert] if has_bias else 0)

    np.testing.assert_array_equal(numpy_of(result), rounded(of_each(expected), dtype))
