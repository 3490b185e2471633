"""Words of scales and of int4 weights, bit by bit."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mortise_npu_ascend.emulator import EmulatedNpu, Generation, install

FRACTAL_NZ = 29
NORMAL = st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=False)


@pytest.fixture(params=Generation)
def npu(request: pytest.FixtureRequest) -> EmulatedNpu:
    return install(request.param)


def bits_of(scale: float) -> int:
    return struct.unpack("<I", struct.pack("<f", scale))[0]


def test_scale_words_are_not_the_plain_bits(npu: EmulatedNpu) -> None:
    words = npu.npu_trans_quant_param(torch.tensor([1.0, 1.0 + 2**-23, 0.1]))
    assert words.dtype == torch.int64
    assert words.tolist() == [1 << 46 | 0x3F800000, 1 << 46 | 0x3F800000, 1 << 46 | 0x3DCCC000]
    assert words[2].item() & 0xFFFFFFFF != bits_of(0.1)


@settings(max_examples=80, deadline=None)
@given(NORMAL, st.one_of(st.none(), st.floats(-300, 300, width=32)))
def test_truncated_scale_and_offset(scale: float, offset: float | None) -> None:
    """(bits & 0xFFFFE000) | 1 << 46, and nine bits of the clipped, rounded offset at bit 37."""
    expected = (bits_of(scale) & 0xFFFFE000) | 1 << 46
    offsets = None
    if offset is not None:
        offsets = torch.tensor([offset])
        expected |= (int(np.clip(np.rint(offset), -256, 255)) & 0x1FF) << 37
    words = install("A2").npu_trans_quant_param(torch.tensor([scale]), offsets)
    assert words.tolist() == [expected]


@settings(max_examples=80, deadline=None)
@given(NORMAL)
def test_rounded_scale_is_the_nearest_of_ten_bits(scale: float) -> None:
    """Half-precision-like rounding, by exact arithmetic on the mantissa; ties go to even."""
    (word,) = install("A2").npu_trans_quant_param(torch.tensor([scale]), None, 1).tolist()
    kept = struct.unpack("<f", struct.pack("<I", word & 0xFFFFFFFF))[0]
    mantissa, exponent = np.frexp(np.float64(scale))
    nearest = float(np.ldexp(np.rint(mantissa * 2**11), int(exponent) - 11))
    largest = float(np.finfo(np.float32).max)
    assert word >> 46 == 1
    assert kept == (nearest if abs(nearest) <= largest else np.copysign(np.inf, scale))


@pytest.mark.parametrize(
    ("bits", "expected"),
    [
        (0x3F801000, 0x3F800000),  # half way, even below
        (0x3F803000, 0x3F804000),  # half way, even above
        (0x3F801001, 0x3F802000),
        (0x3FFFF000, 0x40000000),  # the carry reaches the exponent
        (0x00001800, 0x00000000),  # subnormal
        (0x80001800, 0x80000000),
        (0x7F800000, 0x7F800000),  # infinity
    ],
)
def test_rounding_of_scales(npu: EmulatedNpu, bits: int, expected: int) -> None:
    scale = torch.from_numpy(np.array([bits], dtype=np.uint32).view(np.float32))
    assert npu.npu_trans_quant_param(scale, None, 1).tolist() == [1 << 46 | expected]


@pytest.mark.parametrize(
    ("scale", "offset", "shape"), [((1,), (4,), (4,)), ((4,), (1,), (4,)), ((1, 4), (1, 4), (1, 4))]
)
def test_shapes_of_scale_words(
    npu: EmulatedNpu, scale: tuple[int, ...], offset: tuple[int, ...], shape: tuple[int, ...]
) -> None:
    words = npu.npu_trans_quant_param(torch.ones(scale), torch.full(offset, -1.0))
    assert words.shape == shape
    assert words.unique().tolist() == [1 << 46 | 0x1FF << 37 | 0x3F800000]


@pytest.mark.parametrize(
    ("scale", "offset", "round_mode", "message"),
    [
        (torch.ones(2, 2), None, 0, r"support only \(1, \) and \(1, n\), got \(2, 2\)"),
        (torch.ones(2), None, 2, "round_mode must be 0 or 1. but now is 2"),
        (torch.ones(2).half(), None, 0, "Tensor scale not implemented for DT_FLOAT16"),
        (torch.ones(2), torch.ones(2).int(), 0, "Tensor offset not implemented for DT_INT32"),
        (torch.ones(2), torch.ones(3), 0, "offset first dim should be equal to scale first dim"),
        (torch.ones(1, 2), torch.ones(2), 0, "shape of scale and offset should be equal"),
    ],
)
def test_refusals_of_scales(
    npu: EmulatedNpu,
    scale: torch.Tensor,
    offset: torch.Tensor | None,
    round_mode: int,
    message: str,
) -> None:
    with pytest.raises(RuntimeError, match=message):
        npu.npu_trans_quant_param(scale, offset, round_mode)


def test_the_first_value_of_a_weight_is_the_lowest_nibble(npu: EmulatedNpu) -> None:
    weight = torch.tensor([[1, 2, 3, 4, 5, 6, 7, -8]], dtype=torch.int32)
    assert npu.npu_convert_weight_to_int4pack(weight).item() % 2**32 == 0x87654321


def test_only_the_low_four_bits_of_a_value_count(npu: EmulatedNpu) -> None:
    weight = torch.tensor([[16 + 1] + [0] * 7], dtype=torch.int32)
    assert npu.npu_convert_weight_to_int4pack(weight).tolist() == [[1]]


def test_a_weight_of_three_dimensions() -> None:
    """On the older chips the other experts are lost without a word."""
    weight = torch.arange(-8, 8, dtype=torch.int32).repeat(3).view(3, 2, 8)
    weight[1:] = 7
    for generation in (Generation.A2, Generation.A3):
        first = install(generation).npu_convert_weight_to_int4pack(weight)
        assert first.tolist() == [[-0x01234568], [0x76543210]]
    words = install("A5").npu_convert_weight_to_int4pack(weight)
    assert words.shape == (3, 2, 1)
    assert words[1:].unique().tolist() == [0x77777777]


def test_a_packed_weight_is_stored_as_the_weight_was() -> None:
    npu = install("A2")
    weight = npu.npu_format_cast(torch.zeros(16, 8, dtype=torch.int32), FRACTAL_NZ)
    assert npu.get_npu_format(npu.npu_convert_weight_to_int4pack(weight)) == FRACTAL_NZ


WEIGHT = torch.zeros(4, 8, dtype=torch.int32)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (WEIGHT.t(), "weight should be contiguous"),
        (WEIGHT[0], "weight shape only support dim num 2/3, but it is 1"),
        (
            WEIGHT.to(torch.int8),
            "weight dtype only support int32 and float32, but it is torch.int8",
        ),
        (torch.zeros(4, 7, dtype=torch.int32), "should be the multiple of 8, but it is 7"),
    ],
)
def test_refusals_of_weights(npu: EmulatedNpu, weight: torch.Tensor, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        npu.npu_convert_weight_to_int4pack(weight)


def test_float_weights() -> None:
    """Float32 means float4 values, which the older chips do not have."""
    for generation in (Generation.A2, Generation.A3):
        with pytest.raises(
            RuntimeError, match="expected scalar type Int but found Float"
        ) as caught:
            install(generation).npu_convert_weight_to_int4pack(WEIGHT.float())
        assert not isinstance(caught.value, NotImplementedError)
    with pytest.raises(NotImplementedError, match="packing of float4 is not emulated"):
        install("A5").npu_convert_weight_to_int4pack(WEIGHT.float())


def test_schema(npu: EmulatedNpu) -> None:
    with npu.active():
        for arguments in ((torch.ones(4),), (torch.ones(4), torch.ones(4), 1)):
            torch.library.opcheck(
                torch.ops.npu.npu_trans_quant_param.default, arguments, test_utils=("test_schema",)
            )
        torch.library.opcheck(
            torch.ops.npu.npu_convert_weight_to_int4pack.default,
            (WEIGHT,),
            test_utils=("test_schema",),
        )
