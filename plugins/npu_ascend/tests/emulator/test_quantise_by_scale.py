"""Quantisation by given scales, against numpy and against what the operator's manual prints."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mortise_npu_ascend.emulator import EmulatedNpu, Generation, install

FRACTAL_NZ = 29


@pytest.fixture(params=Generation)
def npu(request: pytest.FixtureRequest) -> EmulatedNpu:
    return install(request.param)


# torch_npu.npu_quantize in the manual of op-plugin: float16 rows, what a device made of them when
# each was multiplied by 3.
PRINTED_ROWS = (
    (0.2600, 0.6782, 0.5024, 0.9492, 0.6089, 0.7461, 1.5332, -0.2123, 0.6558, -0.8354, -0.5366),
    (-0.2522, 0.2415, -0.0269, -0.1497, 0.2256, -0.5239, 0.7363, -0.2468, 1.6064, 1.4170, -0.2213),
    (-0.6328, 0.8105, 0.2532, 1.0684, -1.2119, -0.6865, 0.7451, -0.8120, 0.6401, -2.1270, -0.9482),
    (-1.7461, -1.1758, -0.5352, 1.5938, 1.8945, -2.2500, -0.5073, -0.8164, 0.8267, -0.4377, 1.2490),
)
PRINTED_INTEGERS = [
    [1, 2, 2, 3, 2, 2, 5, -1, 2, -3, -2],
    [-1, 1, 0, 0, 1, -2, 2, -1, 5, 4, -1],
    [-2, 2, 1, 3, -4, -2, 2, -2, 2, -6, -3],
    [-5, -4, -2, 5, 6, -7, -2, -2, 2, -1, 4],
]


def test_what_the_manual_prints(npu: EmulatedNpu) -> None:
    rows = torch.tensor(PRINTED_ROWS, dtype=torch.float16)
    scales = torch.tensor([3.0] * rows.shape[1], dtype=torch.float16)
    assert npu.npu_quantize(rows, scales, None, torch.qint8, -1, False).tolist() == PRINTED_INTEGERS


NUMBERS = st.floats(-300, 300, width=16)
SCALES = st.sampled_from([0.25, 0.5, 1.0, 3.0])


@settings(max_examples=40, deadline=None)
@given(
    hnp.arrays(np.float32, (3, 8), elements=NUMBERS),
    hnp.arrays(np.float32, (8,), elements=SCALES),
    hnp.arrays(np.float32, (8,), elements=st.sampled_from([-3.0, 0.0, 0.5, 2.0])),
)
def test_without_division(rows: np.ndarray, scales: np.ndarray, offsets: np.ndarray) -> None:
    """int8(round(x * scale + offset)); the products are exact here, so ties are decided."""
    npu = install("A2")
    published = np.rint(rows * scales + offsets)
    parameters = torch.from_numpy(scales), torch.from_numpy(offsets)
    integers = npu.npu_quantize(torch.from_numpy(rows), *parameters, torch.qint8, -1, False)
    assert np.array_equal(integers.numpy(), published.clip(-128, 127))
    words = npu.npu_quantize(torch.from_numpy(rows), *parameters, torch.quint4x2, -1, False)
    nibbles = published.clip(-8, 7).astype(np.int64) % 16
    packed = (nibbles << np.arange(0, 32, 4)).sum(axis=-1)
    assert np.array_equal(words.numpy().astype(np.int64)[:, 0] % 2**32, packed)


@settings(max_examples=40, deadline=None)
@given(
    hnp.arrays(np.float32, (3, 4), elements=NUMBERS),
    hnp.arrays(np.float32, (3,), elements=st.sampled_from([0.25, 0.5, 2.0])),
    st.sampled_from([torch.qint8, torch.quint8, torch.qint32]),
)
def test_with_division(rows: np.ndarray, scales: np.ndarray, wanted: torch.dtype) -> None:
    zero_points = np.array([0, 3, -7], dtype=np.int32)
    quantised = install("A2").npu_quantize(
        torch.from_numpy(rows), torch.from_numpy(scales), torch.from_numpy(zero_points), wanted, 0
    )
    plain = {torch.qint8: np.int8, torch.quint8: np.uint8, torch.qint32: np.int32}[wanted]
    limits = np.iinfo(plain)
    published = np.rint(rows / scales[:, None] + zero_points[:, None])
    assert quantised.numpy().dtype == plain
    assert np.array_equal(quantised.numpy(), published.clip(limits.min, limits.max))


def test_division_is_the_default_and_multiplication_takes_the_reciprocal(npu: EmulatedNpu) -> None:
    rows, scale = torch.tensor([[6.0, -6.0]]), torch.tensor([4.0])
    assert npu.npu_quantize(rows, scale, None, torch.qint8).tolist() == [[2, -2]]
    by_product = npu.npu_quantize(rows, 1 / scale, None, torch.qint8, -1, False)
    assert by_product.tolist() == [[2, -2]]


def test_int32_saturates_at_its_ends(npu: EmulatedNpu) -> None:
    rows = torch.tensor([[3e38, -3e38, float("nan")]])
    quantised = npu.npu_quantize(rows, torch.tensor([1.0]), None, torch.int32)
    assert quantised.tolist() == [[2**31 - 1, -(2**31), 0]]


def test_axes_of_the_product(npu: EmulatedNpu) -> None:
    """-2 is the last axis but one; every other value is the last axis."""
    rows, scales = torch.ones(2, 2), torch.tensor([1.0, 2.0])
    last = [[1, 2], [1, 2]]
    for axis, expected in ((-2, [[1, 1], [2, 2]]), (-1, last), (0, last), (1, last)):
        assert npu.npu_quantize(rows, scales, None, torch.qint8, axis, False).tolist() == expected
    as_matrix = npu.npu_quantize(rows, scales.view(2, 1), None, torch.qint8, -2, False)
    assert as_matrix.tolist() == [[1, 1], [2, 2]]


def test_tiled_weights_stay_tiled() -> None:
    npu = install("A2")
    weight = npu.npu_format_cast(torch.full((2, 256, 8), 3.0), FRACTAL_NZ)
    words = npu.npu_quantize(weight, torch.ones(1), None, torch.quint4x2, -1, False)
    assert npu.get_npu_format(words) == FRACTAL_NZ
    assert words.unique().tolist() == [0x33333333]


ROWS = torch.zeros(2, 8)
ONE = torch.ones(1)


@pytest.mark.parametrize(
    ("rows", "scales", "zero_points", "dtype", "axis", "message"),
    [
        (ROWS, ONE, None, torch.float16, 1, r"Param \(dtype\) must be Int8, UInt8, Int32"),
        (ROWS.int(), ONE, None, torch.qint8, 1, "Tensor x not implemented for DT_INT32"),
        (ROWS, ONE.double(), None, torch.qint8, 1, "Tensor scales not implemented for DT_DOUBLE"),
        (ROWS, ONE, ONE.half(), torch.qint8, 1, "zeroPoints not implemented for DT_FLOAT16"),
        (ROWS, ONE.bfloat16(), None, torch.qint8, 1, "expected dtype DT_BFLOAT16"),
        (ROWS, ONE.view(1, 1), None, torch.qint8, 1, "scales shape only support 1 dimension"),
        (ROWS, torch.ones(8), ONE.int(), torch.qint8, 1, "should be equal to zeroPoints size"),
        (ROWS, torch.ones(8), None, torch.qint8, 2, r"Axis out of range .* but got 2\)"),
        (ROWS, torch.ones(7), None, torch.qint8, 1, "must equal to 1 or .* which is 8; it is 7"),
    ],
)
def test_refusals_with_division(
    npu: EmulatedNpu,
    rows: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor | None,
    dtype: torch.dtype,
    axis: int,
    message: str,
) -> None:
    with pytest.raises(RuntimeError, match=message):
        npu.npu_quantize(rows, scales, zero_points, dtype, axis)


@pytest.mark.parametrize("generation", Generation)
def test_float_zero_points_are_for_the_newest_chip(generation: Generation) -> None:
    npu = install(generation)
    if generation is Generation.A5:
        assert npu.npu_quantize(ROWS, ONE, ONE, torch.qint8).unique().tolist() == [1]
        return
    with pytest.raises(RuntimeError, match="Tensor zeroPoints not implemented for DT_FLOAT,"):
        npu.npu_quantize(ROWS, ONE, ONE, torch.qint8)


@pytest.mark.parametrize(
    ("rows", "scales", "offset", "dtype", "axis", "message"),
    [
        (ROWS[:, :7], ONE, None, torch.quint4x2, -1, "last dim must be divded by 8, got 7"),
        (ROWS.int(), ONE, None, torch.qint8, -1, "Tensor x not implemented for DT_INT32"),
        (
            ROWS.half(),
            ONE,
            None,
            torch.qint8,
            -1,
            "input x:DT_FLOAT16 is not compatible with scale:DT_FLOAT",
        ),
        (ROWS, ONE, ONE.half(), torch.qint8, -1, "scale and offset have different dtypes"),
        (ROWS, ONE, torch.ones(8), torch.qint8, -1, "scale and offset have different dtypes or sh"),
        (ROWS[0], ONE, None, torch.qint8, -2, "invalid axis: -2"),
        (ROWS, torch.ones(1, 1, 8), None, torch.qint8, -1, "scale dimNum must be same as x dimNum"),
        (ROWS, torch.ones(7), None, torch.qint8, -1, r"should be same as x dim\(-1\)'s value\(8\)"),
        (ROWS, torch.ones(2, 8), None, torch.qint8, -1, r"the others 1; scale is \(2, 8\)"),
    ],
)
def test_refusals_without_division(
    npu: EmulatedNpu,
    rows: torch.Tensor,
    scales: torch.Tensor,
    offset: torch.Tensor | None,
    dtype: torch.dtype,
    axis: int,
    message: str,
) -> None:
    with pytest.raises(RuntimeError, match=message):
        npu.npu_quantize(rows, scales, offset, dtype, axis, False)


def test_dtypes_that_are_not_emulated(npu: EmulatedNpu) -> None:
    with pytest.raises(NotImplementedError, match="285 without div_mode is not emulated"):
        npu.npu_quantize(ROWS, ONE, None, npu.int4, -1, False)


@pytest.mark.parametrize(
    ("dtype", "div_mode"),
    [(torch.qint8, True), (torch.qint32, True), (torch.qint8, False), (torch.quint4x2, False)],
)
def test_schema(npu: EmulatedNpu, dtype: torch.dtype, div_mode: bool) -> None:
    arguments = (ROWS, torch.ones(8), None, dtype, -1, div_mode)
    with npu.active():
        torch.library.opcheck(
            torch.ops.npu.npu_quantize.default, arguments, test_utils=("test_schema",)
        )
