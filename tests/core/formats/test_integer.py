"""int8 and int4 against the compressed-tensors library, and against exact arithmetic in numpy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import (
    pack_to_int32,
    unpack_from_int32,
)
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
from hypothesis import given, settings
from hypothesis import strategies as st

from mortise.errors import QuantizationConfigError
from mortise.formats.integer import (
    LARGEST,
    Bits,
    dequantise_int,
    from_offset_binary,
    pack_int4,
    pack_int4_bytes,
    quantise_int_rows,
    quantise_int_weight,
    quantise_static_int8,
    to_offset_binary,
    unpack_int4,
    unpack_int4_bytes,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

BITS: tuple[Bits, Bits] = (8, 4)
FLOATS = (torch.float32, torch.bfloat16)
# A scale is rounded, and so are a quotient and a product: half a step, and a few last bits more.
HALF_STEP = 0.5 + 1e-4


@st.composite
def tensors(draw: st.DrawFn, columns: st.SearchStrategy[int]) -> torch.Tensor:
    """Rows of any magnitude that a weight or an activation may have, some of them zero."""
    rows, width = draw(st.integers(0, 4)), draw(columns)
    values = draw(
        st.lists(st.floats(-8, 8, width=16), min_size=rows * width, max_size=rows * width)
    )
    exponents = draw(st.lists(st.integers(-40, 40), min_size=rows, max_size=rows))
    factors = torch.tensor(exponents, dtype=torch.float32).exp2().unsqueeze(-1)
    return torch.tensor(values, dtype=torch.float32).reshape(rows, width) * factors


def in_numpy(rows: torch.Tensor, largest: int) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """The published definition of dynamic per-token quantisation, for rows that are not zero."""
    x = rows.float().numpy()
    amax = np.abs(x).max(axis=-1, keepdims=True)
    values = np.rint(x * (np.float32(largest) / amax))
    return values.astype(np.int8), (amax / np.float32(largest)).squeeze(-1)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bits", BITS)
def test_rows_are_those_of_the_definition(bits: Bits, dtype: torch.dtype) -> None:
    hidden = torch.randn(64, 129, generator=torch.Generator().manual_seed(1)).to(dtype)
    values, scale = quantise_int_rows(hidden, bits)
    expected_values, expected_scale = in_numpy(hidden, LARGEST[bits])
    np.testing.assert_array_equal(values.numpy(), expected_values)
    np.testing.assert_array_equal(scale.numpy(), expected_scale)
    assert (values.dtype, scale.dtype) == (torch.int8, torch.float32)


@pytest.mark.parametrize("bits", BITS)
@settings(max_examples=50)
@given(hidden=tensors(st.integers(1, 9)), dtype=st.sampled_from(FLOATS))
def test_rows_come_back_within_half_a_step(
    bits: Bits, hidden: torch.Tensor, dtype: torch.dtype
) -> None:
    hidden = hidden.to(dtype)
    values, scale = quantise_int_rows(hidden, bits)
    largest = LARGEST[bits]
    assert values.abs().le(largest).all()
    error = (dequantise_int(values, scale.unsqueeze(-1)) - hidden.float()).abs()
    assert error.le(scale.unsqueeze(-1) * HALF_STEP).all()
    # The largest magnitude of a row takes the largest value: no range is given away.
    assert values.abs().amax(dim=-1).eq(torch.where(scale > 0, largest, 0)).all()
    assert scale.eq(0).equal(hidden.eq(0).all(dim=-1))


def test_ties_go_to_even() -> None:
    # The largest value is the range itself, so that the scale is 1 and every half is a tie.
    hidden = torch.tensor([[127, 0.5, 1.5, 2.5, 3.5, -0.5, -1.5, -2.5, 125.5, 126.5]])
    values, scale = quantise_int_rows(hidden, 8)
    assert values.tolist() == [[127, 0, 2, 2, 4, 0, -2, -2, 126, 126]]
    assert scale.tolist() == [1]
    weight, _ = quantise_int_weight(torch.tensor([[7, 0.5, 1.5, 2.5, 3.5, -4.5, -5.5, -6.5]]), 4)
    assert weight.tolist() == [[7, 0, 2, 2, 4, -4, -6, -6]]
    static = quantise_static_int8(
        torch.tensor([0.25, 0.75, 1.25, -0.25]), torch.tensor([0.5]), torch.tensor([0.0])
    )
    assert static.tolist() == [0, 2, 2, 0]


@pytest.mark.parametrize("bits", BITS)
def test_zero_rows_have_scale_zero_and_zero_groups_scale_one(bits: Bits) -> None:
    # The second would have a scale that is no normal float32: its products would not be exact.
    hidden = torch.tensor([[0.0, -0.0], [1e-38, -1e-38], [1.0, 0.0]])
    values, scale = quantise_int_rows(hidden, bits)
    assert values[:2].eq(0).all()
    assert scale[:2].tolist() == [0, 0]
    assert scale[2] > 0
    values, scale = quantise_int_weight(hidden, bits, 1)
    assert scale[:2].tolist() == [[1, 1], [1, 1]]
    assert values.tolist() == [[0, 0], [0, 0], [LARGEST[bits], 0]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("bits", BITS)
def test_what_is_not_finite_stays_visible(bits: Bits, bad: float) -> None:
    hidden = torch.tensor([[1.0, bad], [1.0, 2.0]])
    values, scale = quantise_int_rows(hidden, bits)
    back = dequantise_int(values, scale.unsqueeze(-1))
    assert back[0].isnan().all()
    assert back[1].isfinite().all()
    values, groups = quantise_int_weight(hidden, bits)
    assert dequantise_int(values, groups)[0].isnan().all()


@pytest.mark.parametrize("shape", [(0, 16), (2, 0, 16), (2, 3, 5, 16)])
def test_leading_dimensions(shape: tuple[int, ...]) -> None:
    values, scale = quantise_int_rows(torch.ones(shape), 8)
    assert (values.shape, scale.shape) == (shape, shape[:-1])
    values, scale = quantise_int_weight(torch.ones(shape), 4, 8)
    assert (values.shape, scale.shape) == (shape, (*shape[:-1], 2))
    assert dequantise_int(values, scale).shape == shape
    assert pack_int4(values).shape == (*shape[:-1], 2)
    assert unpack_int4(pack_int4(values)).equal(values)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("bits", "group_size", "strategy"),
    [(8, None, "channel"), (4, None, "channel"), (4, 16, "group")],
)
def test_weights_are_those_of_compressed_tensors(
    bits: Bits, group_size: int | None, strategy: str, dtype: torch.dtype
) -> None:
    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(2)).to(dtype)
    values, scale = quantise_int_weight(weight, bits, group_size)
    arguments = QuantizationArgs(
        num_bits=bits, type="int", symmetric=True, strategy=strategy, group_size=group_size
    )
    zero = torch.zeros_like(scale)
    theirs = quantize(weight.float(), scale, zero, arguments, dtype=torch.int8)
    assert values.equal(theirs)
    assert dequantise_int(values, scale).equal(dequantize(values, scale, zero, arguments))
    groups = weight.float().numpy().reshape(24, scale.shape[-1], -1)
    largest = np.float32(LARGEST[bits])
    np.testing.assert_array_equal(scale.numpy(), np.abs(groups).max(axis=-1) / largest)


@pytest.mark.parametrize("bits", BITS)
@settings(max_examples=50)
@given(weight=tensors(st.sampled_from([8, 16, 24])), group_size=st.sampled_from([None, 1, 4, 8]))
def test_weights_come_back_within_half_a_step(
    bits: Bits, weight: torch.Tensor, group_size: int | None
) -> None:
    values, scale = quantise_int_weight(weight, bits, group_size)
    assert values.abs().le(LARGEST[bits]).all()
    assert scale.gt(0).all()
    steps = scale.repeat_interleave(group_size or weight.shape[-1], dim=-1)
    error = (dequantise_int(values, scale) - weight).abs()
    assert error.le(steps * HALF_STEP).all()


def test_dequantised_values_are_rounded_once() -> None:
    values, scale = torch.tensor([[127, -3]], dtype=torch.int8), torch.tensor([[1 / 3]])
    exact = values.double() * scale.double()
    assert dequantise_int(values, scale, torch.bfloat16).equal(exact.to(torch.bfloat16))


def test_group_size_must_divide_the_columns() -> None:
    with pytest.raises(QuantizationConfigError, match="40 is no multiple of 16"):
        quantise_int_weight(torch.ones(2, 40), 4, 16)
    with pytest.raises(QuantizationConfigError, match="40 is no multiple of 3"):
        dequantise_int(torch.ones(2, 40, dtype=torch.int8), torch.ones(2, 3))


@settings(max_examples=50)
@given(
    hidden=tensors(st.integers(1, 9)),
    scale=st.floats(2**-8, 4, width=32),
    offset=st.integers(-128, 127),
)
def test_static_input_is_that_of_the_definition(
    hidden: torch.Tensor, scale: float, offset: int
) -> None:
    values = quantise_static_int8(hidden, torch.tensor([scale]), torch.tensor([float(offset)]))
    quotients = hidden.numpy() / np.float32(scale) + np.float32(offset)
    np.testing.assert_array_equal(values.numpy(), np.rint(quotients).clip(-128, 127))


def every_word_position() -> torch.Tensor:
    """All 16 values at each of the eight places of a word, ``[128, 8]``."""
    words = torch.zeros(16, 8, 8, dtype=torch.int8)
    for place in range(8):
        words[:, place, place] = torch.arange(-8, 8, dtype=torch.int8)
    return words.flatten(0, 1)


NIBBLES = st.lists(st.integers(-8, 7), min_size=16, max_size=16)


@pytest.mark.parametrize("values", [every_word_position(), -1 - every_word_position()])
def test_words_hold_the_lowest_nibble_first(values: torch.Tensor) -> None:
    # Python's integers have no sign bit to trip over.
    expected = [
        sum((v & 0xF) << (4 * place) for place, v in enumerate(row)) for row in values.tolist()
    ]
    packed = pack_int4(values)
    assert [word % (1 << 32) for word in packed.flatten().tolist()] == expected
    assert packed.dtype == torch.int32
    assert unpack_int4(packed).equal(values)


@settings(max_examples=50)
@given(st.lists(NIBBLES, min_size=1, max_size=4))
def test_words_are_those_of_compressed_tensors(rows: list[list[int]]) -> None:
    values = torch.tensor(rows, dtype=torch.int8).reshape(len(rows), 16)
    theirs = pack_to_int32(values, 4)
    assert to_offset_binary(pack_int4(values)).equal(theirs)
    assert unpack_int4(from_offset_binary(theirs)).equal(values)
    ours = to_offset_binary(pack_int4(values))
    assert unpack_from_int32(ours, 4, values.shape).equal(values)
    assert from_offset_binary(ours).dtype == torch.int32


@pytest.mark.parametrize("dim", [0, 1, -1, -2])
@settings(max_examples=20)
@given(rows=st.lists(NIBBLES, max_size=6).filter(lambda rows: len(rows) % 2 == 0))
def test_bytes_hold_pairs_along_any_dimension(dim: int, rows: list[list[int]]) -> None:
    values = torch.tensor(rows, dtype=torch.int8).reshape(len(rows), 16)
    packed = pack_int4_bytes(values, dim)
    along = np.moveaxis(values.numpy().astype(np.int64), dim, 0)
    expected = (along[1::2] & 0xF) << 4 | (along[0::2] & 0xF)
    np.testing.assert_array_equal(np.moveaxis(packed.numpy().view(np.uint8), dim, 0), expected)
    assert packed.dtype == torch.int8
    assert unpack_int4_bytes(packed, dim).equal(values)
    assert unpack_int4_bytes(packed.view(torch.uint8), dim).equal(values)


def test_bytes_along_the_columns_are_the_words() -> None:
    values = every_word_position()
    assert pack_int4_bytes(values, -1).view(torch.int32).equal(pack_int4(values))


def test_strided_input_is_packed_by_its_elements() -> None:
    values = torch.arange(-8, 8, dtype=torch.int8).repeat(8, 1)
    packed = pack_int4(values.T)
    assert packed.equal(pack_int4(values.T.contiguous()))
    assert unpack_int4(packed.T.contiguous().T).equal(values.T)


def test_sizes_that_do_not_pack() -> None:
    with pytest.raises(QuantizationConfigError, match="12 is no multiple of 8"):
        pack_int4(torch.zeros(2, 12, dtype=torch.int8))
    with pytest.raises(QuantizationConfigError, match="3 is no multiple of 2"):
        pack_int4_bytes(torch.zeros(3, 4, dtype=torch.int8), -2)
