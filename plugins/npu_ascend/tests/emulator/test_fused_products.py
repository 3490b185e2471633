"""Grouped products that go on: to SwiGLU and int8 rows, or to the sum of each token's rows."""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from tests.fixtures.ascend_numbers import bits, numpy_of, packed

from mortise_npu_ascend.emulator import EmulatedNpu, Generation, install

if TYPE_CHECKING:
    from collections.abc import Callable

E, K, N = 3, 192, 256
COUNTS = [2, 0, 3]
ROWS = sum(COUNTS)
TRAILING = 2
OLDER = (Generation.A2, Generation.A3)

GENERATOR = np.random.default_rng(0)
X8 = GENERATOR.integers(-127, 128, (ROWS + TRAILING, K)).astype(np.int8)
X4 = GENERATOR.integers(-8, 8, (ROWS + TRAILING, K))
W8 = GENERATOR.integers(-127, 128, (E, K, N)).astype(np.int8)
W4 = GENERATOR.integers(-8, 8, (E, K, N))
ROW_SCALE = GENERATOR.uniform(1e-3, 1e-2, ROWS + TRAILING).astype(np.float32)
SCALE = GENERATOR.uniform(1e-3, 1e-2, (E, N)).astype(np.float32)
ASSIST = (8.0 * (W4 * SCALE[:, None].astype(np.float64)).sum(axis=1)).astype(np.float32)
SMOOTH = GENERATOR.uniform(0.5, 2, (E, N // 2)).astype(np.float32)
ENDS = torch.tensor(COUNTS).cumsum(0)


@pytest.fixture(params=OLDER)
def npu(request: pytest.FixtureRequest) -> EmulatedNpu:
    return with_tiles(request.param)


def with_tiles(generation: Generation) -> EmulatedNpu:
    npu = install(generation)
    npu.config.allow_internal_format = True
    return npu


def tiled(npu: EmulatedNpu, weight: np.ndarray | torch.Tensor) -> torch.Tensor:
    return npu.npu_format_cast(torch.as_tensor(weight), npu.Format.FRACTAL_NZ)


def of_each(part: Callable[[int, slice], np.ndarray]) -> np.ndarray:
    spans = pairwise([0, *accumulate(COUNTS)])
    return np.concatenate([part(e, slice(start, end)) for e, (start, end) in enumerate(spans)])


def int8_product(expert: int, rows: slice) -> np.ndarray:
    exact = X8[rows].astype(np.int64) @ W8[expert].astype(np.int64)
    return exact * SCALE[expert].astype(np.float64) * ROW_SCALE[rows, None]


def int4_weight_product(expert: int, rows: slice) -> np.ndarray:
    """What the two halves and the assist bias amount to; fp16 between costs up to 2e-3."""
    exact = X8[rows].astype(np.int64) @ W4[expert]
    return exact * SCALE[expert].astype(np.float64) * ROW_SCALE[rows, None]


def int4_product(expert: int, rows: slice) -> np.ndarray:
    exact = X4[rows] @ W4[expert]
    half = (exact.astype(np.float32) * SCALE[expert]).astype(np.float16)
    return half.astype(np.float64) * ROW_SCALE[rows, None]


def swiglu(values: np.ndarray) -> np.ndarray:
    """The left half is the gate."""
    gate, up = np.split(values, 2, axis=1)
    return gate / (1 + np.exp(-gate)) * up


def check_rows(
    result: tuple[torch.Tensor, torch.Tensor], activated: np.ndarray, tolerance: float
) -> None:
    """int8 rows and scales stand for the numbers; rows behind the last group for nothing."""
    rows, scales = result[0], result[1]
    assert (rows.dtype, scales.dtype) == (torch.int8, torch.float32)
    assert (rows.shape, scales.shape) == ((ROWS + TRAILING, N // 2), (ROWS + TRAILING,))
    largest = np.abs(activated).max(axis=1)
    np.testing.assert_allclose(scales[:ROWS], largest / 127, rtol=max(tolerance, 1e-5))
    off = np.abs(rows[:ROWS].numpy() - activated / largest[:, None] * 127)
    assert off.max() <= 0.5 + 127 * tolerance + 1e-3
    assert (rows[ROWS:] == -128).all()
    assert scales[ROWS:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_version(npu: EmulatedNpu, dtype: torch.dtype) -> None:
    scale = torch.from_numpy(SCALE).to(dtype)
    result = npu.npu_grouped_matmul_swiglu_quant(
        torch.from_numpy(X8), tiled(npu, W8), ENDS, scale, torch.from_numpy(ROW_SCALE)
    )
    ratio = numpy_of(scale) / SCALE
    activated = of_each(lambda e, rows: swiglu(int8_product(e, rows) * ratio[e]))
    check_rows(result[:2], activated, 1e-5)
    assert result[2].shape == ()
    assert result[2].isnan()


def test_int8_rows_and_weights_by_either_list(npu: EmulatedNpu) -> None:
    arguments = (
        torch.from_numpy(X8),
        [tiled(npu, W8)],
        [torch.from_numpy(SCALE)],
        torch.from_numpy(ROW_SCALE),
    )
    by_ends = npu.npu_grouped_matmul_swiglu_quant_v2(*arguments, ENDS)
    by_counts = npu.npu_grouped_matmul_swiglu_quant_v2(
        *arguments, torch.tensor(COUNTS), group_list_type=1
    )
    for one, other in zip(by_ends, by_counts, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    check_rows(by_ends, of_each(lambda e, rows: swiglu(int8_product(e, rows))), 1e-5)


@pytest.mark.parametrize("groups", [None, 1])
@pytest.mark.parametrize("version", [1, 2])
def test_int4_weights_need_the_assist_matrix(
    npu: EmulatedNpu, version: int, groups: int | None
) -> None:
    x, row_scale = torch.from_numpy(X8), torch.from_numpy(ROW_SCALE)
    words, assist = bits(SCALE if groups is None else SCALE[:, None]), torch.from_numpy(ASSIST)
    result = (
        npu.npu_grouped_matmul_swiglu_quant(x, packed(W4), ENDS, words, row_scale, bias=assist)
        if version == 1
        else npu.npu_grouped_matmul_swiglu_quant_v2(
            x,
            [packed(W4)],
            [words],
            row_scale,
            ENDS,
            weight_assist_matrix=[assist],
            dequant_mode=0 if groups is None else 1,
        )
    )
    activated = of_each(lambda e, rows: swiglu(int4_weight_product(e, rows)))
    check_rows(result[:2], activated, 2e-2)


@pytest.mark.parametrize("smooth", [None, "column", "expert"])
def test_int4_rows_become_int8_rows(npu: EmulatedNpu, smooth: str | None) -> None:
    """Never int4: what follows must take int8 rows."""
    given = {None: None, "column": SMOOTH, "expert": SMOOTH[:, 0]}[smooth]
    result = npu.npu_grouped_matmul_swiglu_quant_v2(
        packed(X4),
        [packed(W4)],
        [bits(SCALE)],
        torch.from_numpy(ROW_SCALE),
        ENDS,
        smooth_scale=None if given is None else torch.from_numpy(given),
    )
    factor = np.ones((E, 1)) if given is None else given.reshape(E, -1)
    activated = of_each(lambda e, rows: swiglu(int4_product(e, rows)) * factor[e])
    check_rows(result, activated, 1e-4)


def test_a_row_of_zeros(npu: EmulatedNpu) -> None:
    rows, scales = npu.npu_grouped_matmul_swiglu_quant_v2(
        torch.zeros(1, K, dtype=torch.int8),
        [tiled(npu, W8[:1])],
        [torch.from_numpy(SCALE[:1])],
        torch.ones(1),
        torch.tensor([1]),
    )
    assert not rows.any()
    assert scales.tolist() == [0.0]


def test_a5_takes_int8_in_plain_storage_only() -> None:
    npu = with_tiles(Generation.A5)
    arguments = (torch.from_numpy(X8), [torch.from_numpy(SCALE)], torch.from_numpy(ROW_SCALE), ENDS)

    def call(weight: torch.Tensor, x: torch.Tensor = arguments[0]) -> Any:
        return npu.npu_grouped_matmul_swiglu_quant_v2(x, [weight], *arguments[1:])

    result = call(torch.from_numpy(W8))
    check_rows(result, of_each(lambda e, rows: swiglu(int8_product(e, rows))), 1e-5)
    with pytest.raises(RuntimeError, match=r"\[weight\] is not supported, got \[FRACTAL_NZ\]"):
        call(tiled(npu, W8))
    with pytest.raises(RuntimeError, match="no matching x dtype"):
        call(packed(W4))
    with pytest.raises(RuntimeError, match="no matching x dtype"):
        call(packed(W4), packed(X4))


def swiglu_arguments(npu: EmulatedNpu, **given: Any) -> dict[str, Any]:
    return {
        "x": torch.from_numpy(X8),
        "weight": [tiled(npu, W8)],
        "weight_scale": [torch.from_numpy(SCALE)],
        "x_scale": torch.from_numpy(ROW_SCALE),
        "group_list": ENDS,
    } | given


INT4 = {"weight": [packed(W4)], "weight_scale": [bits(SCALE)]}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"weight": [torch.from_numpy(W8)]}, "the format of [weight] is not supported, got [ND]"),
        ({"weight": [torch.from_numpy(W8)] * 2}, "size of weight should be 1, current size is 2"),
        (INT4, "[bias] must not be nullptr"),
        ({"x": torch.from_numpy(X8).bfloat16()}, "no matching x dtype"),
        ({"bias": torch.zeros(1)}, "[bias] must be nullptr"),
        ({"x_scale": torch.ones(3)}, "MDim[3] of perTokenScaleOptional"),
        ({"group_list": ENDS.int()}, "Only int64 is supported for groupList."),
        ({"dequant_mode": 1}, "[dequantMode] is not supported"),
        ({"smooth_scale": torch.ones(E)}, "[smoothScale] must be nullptr"),
        (INT4 | {"x": packed(X4), "smooth_scale": torch.ones(E, N)}, "(E,) or (E, N / 2)"),
        (INT4 | {"x": packed(X4), "dequant_mode": 1}, "[dequantMode] is not supported"),
        ({"weight_scale": [torch.ones(E, N, dtype=torch.int64)]}, "data type of [weightScale]"),
    ],
)
def test_what_swiglu_refuses(npu: EmulatedNpu, given: dict[str, Any], words: str) -> None:
    with pytest.raises(RuntimeError, match="emulated Ascend") as caught:
        npu.npu_grouped_matmul_swiglu_quant_v2(**swiglu_arguments(npu, **given))
    assert words in str(caught.value)


def test_swiglu_limits_columns_and_the_inner_axis(npu: EmulatedNpu) -> None:
    def call(inner: int, columns: int) -> None:
        weight = tiled(npu, torch.zeros(1, inner, columns, dtype=torch.int8))
        npu.npu_grouped_matmul_swiglu_quant(
            torch.zeros(1, inner, dtype=torch.int8),
            weight,
            torch.tensor([1]),
            torch.ones(1, columns),
            torch.ones(1),
        )

    call(16, 10240)
    with pytest.raises(RuntimeError, match=r"got \[N 10272\]"):
        call(16, 10272)
    weight = torch.zeros(1, 20000, 1, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="must be lower than 20000"):
        npu.npu_grouped_matmul_swiglu_quant(
            torch.zeros(1, 20000, dtype=torch.int8),
            weight,
            torch.tensor([1]),
            torch.ones(1, 8, dtype=torch.int64),
            torch.ones(1),
            bias=torch.zeros(1, 8),
        )


BATCH = 3
LOGIT = GENERATOR.uniform(0, 1, ROWS + TRAILING).astype(np.float32)
ROW_INDEX = np.array([2, 0, 0, 2, 1, 1, 1])
SHARED = torch.from_numpy(GENERATOR.normal(size=(2, N)).astype(np.float32)).bfloat16()


def finalize(npu: EmulatedNpu, **given: Any) -> torch.Tensor:
    weight = given.pop("w", None)
    arguments = {
        "scale": torch.from_numpy(SCALE),
        "pertoken_scale": torch.from_numpy(ROW_SCALE),
        "logit": torch.from_numpy(LOGIT),
        "row_index": torch.from_numpy(ROW_INDEX),
        "output_bs": BATCH,
    } | given
    w = tiled(npu, W8) if weight is None else weight
    group_list = arguments.pop("group_list", torch.tensor(COUNTS))
    return npu.npu_grouped_matmul_finalize_routing(torch.from_numpy(X8), w, group_list, **arguments)


def summed(product: Callable[[int, slice], np.ndarray]) -> np.ndarray:
    """y[row_index[m]] += logit[m] * row m, for the rows that belong to a group."""
    rows = of_each(product)
    result = np.zeros((BATCH, N))
    for m, row in enumerate(rows):
        result[ROW_INDEX[m]] += LOGIT[m] * row
    return result


@pytest.mark.parametrize("generation", Generation)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_rows_are_summed_by_token(generation: Generation, dtype: torch.dtype) -> None:
    npu = with_tiles(generation)
    index = torch.from_numpy(ROW_INDEX).to(dtype)
    by_counts = finalize(npu, row_index=index)
    assert (by_counts.dtype, by_counts.shape) == (torch.float32, (BATCH, N))
    np.testing.assert_allclose(by_counts, summed(int8_product), rtol=1e-4, atol=1e-4)
    by_ends = finalize(npu, row_index=index, group_list=ENDS, group_list_type=0)
    assert torch.equal(by_counts, by_ends)


def test_the_shared_expert_has_its_own_rows(npu: EmulatedNpu) -> None:
    plain = finalize(npu)
    shared = finalize(npu, shared_input=SHARED, shared_input_weight=0.5, shared_input_offset=1)
    assert torch.equal(shared[:1], plain[:1])
    np.testing.assert_allclose(shared[1:], plain[1:] + 0.5 * SHARED.float(), rtol=1e-5, atol=1e-5)


def test_without_a_batch_every_row_has_its_place(npu: EmulatedNpu) -> None:
    index = torch.arange(ROWS + TRAILING)
    result = finalize(npu, output_bs=0, row_index=index, logit=torch.ones(ROWS + TRAILING))
    np.testing.assert_allclose(result[:ROWS], of_each(int8_product), rtol=1e-4, atol=1e-4)
    assert not result[ROWS:].any()


@pytest.mark.parametrize("offset", [False, True])
def test_int4_weights_are_summed_too(npu: EmulatedNpu, offset: bool) -> None:
    given = {}
    if offset:
        given = {"offset": torch.full((E, 1, N), 0.01)}
        given["pertoken_scale"] = torch.from_numpy(ROW_SCALE)
    result = finalize(
        npu, w=packed(W4), scale=bits(SCALE[:, None]), bias=torch.from_numpy(ASSIST), **given
    )

    def product(expert: int, rows: slice) -> np.ndarray:
        shift = 0.01 * X8[rows].astype(np.int64).sum(1, keepdims=True) * ROW_SCALE[rows, None]
        return int4_weight_product(expert, rows) + (shift if offset else 0)

    np.testing.assert_allclose(result, summed(product), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"w": torch.from_numpy(W8)}, "Only support x1: ND, x2: NZ"),
        ({"scale": torch.ones(E, N, dtype=torch.bfloat16)}, "[scale dtype should be DT_FLOAT]"),
        ({"scale": None}, "[scale] must not be nullptr"),
        ({"pertoken_scale": None}, "[per_token_scale] must not be nullptr"),
        ({"bias": torch.zeros(E, N)}, "[bias] must be nullptr"),
        ({"w": packed(W4), "scale": bits(SCALE[:, None])}, "[bias] must not be nullptr"),
        (
            {"w": packed(W4), "scale": bits(SCALE), "bias": torch.from_numpy(ASSIST)},
            "Scale second dim should be 1",
        ),
        ({"dtype": torch.bfloat16}, "Not supportted output dtype is torch.bfloat16"),
        ({"output_bs": 8}, "outputBS should be less than or equal to x MDim"),
        ({"logit": torch.ones(3)}, "logit first dim should equal to x MDim 7"),
        ({"row_index": torch.full((7,), 3)}, "rowIndex must lie in 0..2"),
        ({"row_index": torch.ones(7)}, "data types of [logit, rowIndex]"),
        ({"group_list_type": 2}, "groupListType should be 0 or 1, but is 2"),
        ({"shared_input": SHARED.float()}, "shareInput should be DT_BFLOAT16"),
        ({"shared_input": SHARED, "shared_input_offset": 2}, "shareInputOffset add shareInputDim"),
        ({"logit": None}, "without logit and row_index is not emulated"),
    ],
)
def test_what_finalize_refuses(npu: EmulatedNpu, given: dict[str, Any], words: str) -> None:
    with pytest.raises(RuntimeError, match="emulated Ascend") as caught:
        finalize(npu, **given)
    assert words in str(caught.value)


@pytest.mark.parametrize(("inner", "columns"), [(16, 224), (16, 272), (24, 256)])
def test_finalize_limits_the_weight(npu: EmulatedNpu, inner: int, columns: int) -> None:
    weight = torch.zeros(1, inner, columns, dtype=torch.int8)
    with pytest.raises(RuntimeError, match=r"do not support. only support|should be divisible by"):
        npu.npu_grouped_matmul_finalize_routing(
            torch.zeros(1, inner, dtype=torch.int8),
            tiled(npu, weight),
            torch.tensor([1]),
            scale=torch.ones(1, columns),
            pertoken_scale=torch.ones(1),
            logit=torch.ones(1),
            row_index=torch.zeros(1, dtype=torch.int64),
        )


def test_a5_sums_no_int4_weights() -> None:
    npu = with_tiles(Generation.A5)
    with pytest.raises(RuntimeError, match="are not supported"):
        finalize(npu, w=packed(W4), scale=bits(SCALE[:, None]), bias=torch.from_numpy(ASSIST))
    half = torch.from_numpy(SCALE).bfloat16()
    ratio = numpy_of(half) / SCALE
    expected = summed(lambda e, rows: int8_product(e, rows) * ratio[e])
    np.testing.assert_allclose(finalize(npu, scale=half), expected, rtol=1e-4, atol=1e-4)
