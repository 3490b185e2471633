"""Float8 e4m3, judged by the vendor's headers, by transformers and by arithmetic in float64."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.fixtures.float_values import bytes_of, random_floats, rounding_classes
from torch.testing import assert_close
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize

from mortise.errors import QuantizationConfigError
from mortise.formats.fp8 import (
    E4M3_MAX,
    GROUP,
    ceil_to_ue8m0,
    dequantise_fp8_block,
    dequantise_fp8_rows,
    pack_ue8m0,
    quantise_fp8_block,
    quantise_fp8_rows,
    to_e4m3,
    unpack_ue8m0,
)
from mortise.spec.weights import ScaleFormat

if TYPE_CHECKING:
    from tests.fixtures.vendor_conversions import VendorConversions

MILLION = 1 << 20
FORMATS = (ScaleFormat.FLOAT32, ScaleFormat.UE8M0)
seeds = st.integers(0, 2**31 - 1)
magnitudes = st.sampled_from([1e-30, 1e-12, 1e-3, 1.0, 3e4, 1e30])


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def same_bytes(left: torch.Tensor, right: torch.Tensor) -> None:
    assert_close(bytes_of(left), bytes_of(right), rtol=0, atol=0)


# Conversion.


@pytest.mark.parametrize(
    "values",
    [
        pytest.param(rounding_classes(), id="every class"),
        pytest.param(random_floats(MILLION, (-127, 128)), id="any bits"),
        pytest.param(random_floats(MILLION, (-12, 9)), id="in range"),
    ],
)
def test_conversion_is_the_vendors(vendor: VendorConversions, values: torch.Tensor) -> None:
    same_bytes(to_e4m3(values), vendor.to_e4m3(values))


def test_conversion_of_every_bfloat16_is_the_vendors(vendor: VendorConversions) -> None:
    values = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    same_bytes(to_e4m3(values), vendor.to_e4m3(values.float()))


def test_every_code_means_what_the_vendor_says(vendor: VendorConversions) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    values = codes.view(torch.float8_e4m3fn).float()
    assert_close(values, vendor.from_e4m3(codes), rtol=0, atol=0, equal_nan=True)
    numbers = ~values.isnan()
    same_bytes(to_e4m3(values)[numbers], codes[numbers])


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.0, 0.0),
        (1.0625, 1.0),  # ties to the even neighbour, down
        (1.1875, 1.25),  # and up
        (2**-10, 0.0),
        (3 * 2**-10, 2**-8),
        (2**-9, 2**-9),
        (464.0, 448.0),
        (464.1, 448.0),
        (1e30, 448.0),
        (float("inf"), 448.0),
    ],
)
@pytest.mark.parametrize("sign", [1, -1])
def test_ties_subnormals_and_saturation(value: float, expected: float, sign: int) -> None:
    assert to_e4m3(torch.tensor([sign * value])).float().tolist() == [sign * expected]


def test_a_nan_stays_one_and_a_zero_keeps_its_sign() -> None:
    values = torch.tensor([float("nan"), -float("nan"), -0.0, 0.0])
    assert bytes_of(to_e4m3(values)).tolist() == [0x7F, 0x7F, 0x80, 0]


# Powers of two.


def test_rounding_up_is_the_vendors(vendor: VendorConversions) -> None:
    values = torch.cat((rounding_classes(), random_floats(MILLION, (-127, 128)))).abs()
    values = values[~values.isnan()]
    # The vendor's smallest is 2**-127 (0); ours is 2**-126, the smallest that is normal.
    exponents = vendor.to_ue8m0(values).clamp(min=1)
    same_bytes((bytes_of(ceil_to_ue8m0(values)) >> 23).to(torch.uint8), exponents)


def test_rounding_up_is_exact_beside_powers_of_two() -> None:
    powers = torch.ldexp(torch.ones(253), torch.arange(-126, 127))
    up, down = torch.full_like(powers, torch.inf), torch.zeros_like(powers)
    assert torch.equal(ceil_to_ue8m0(powers), powers)
    assert torch.equal(ceil_to_ue8m0(torch.nextafter(powers, up)), 2 * powers)
    assert torch.equal(ceil_to_ue8m0(torch.nextafter(powers, down)), powers)


def test_rounding_up_agrees_with_frexp() -> None:
    values = random_floats(1 << 16, (-126, 126)).abs()
    fraction, exponent = np.frexp(values.numpy())
    expected = np.ldexp(1.0, exponent - (fraction == 0.5))
    assert np.array_equal(ceil_to_ue8m0(values).numpy().astype(np.float64), expected)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 2.0**127, 1.5 * 2.0**127])
def test_nothing_exceeds_the_largest_power(value: float) -> None:
    assert ceil_to_ue8m0(torch.tensor([value])).tolist() == [2.0**127]


def test_packed_exponents_lie_from_the_lowest_byte_upwards() -> None:
    scale = torch.tensor([[1.0, 2.0, 4.0, 0.5, 8.0]])
    packed = pack_ue8m0(scale)
    assert packed.dtype == torch.int32
    assert packed.tolist() == [[127 | 128 << 8 | 129 << 16 | 126 << 24, 130]]


@given(seeds, st.integers(1, 9), st.integers(0, 3))
def test_unpacking_undoes_packing(seed: int, columns: int, rows: int) -> None:
    scale = ceil_to_ue8m0(random_floats(rows * columns, (-126, 127), seed).abs())
    packed = pack_ue8m0(scale.view(rows, columns))
    assert packed.shape == (rows, -(-columns // 4))
    assert torch.equal(unpack_ue8m0(packed, columns), scale.view(rows, columns))


def test_packed_bytes_are_those_of_torch() -> None:
    scale = ceil_to_ue8m0(random_floats(4096, (-126, 127)).abs())
    assert torch.equal(pack_ue8m0(scale).view(torch.float8_e8m0fnu).float(), scale)


def test_unpacking_takes_words_that_lie_apart() -> None:
    scale = ceil_to_ue8m0(random_floats(24, (-20, 20)).abs()).view(3, 8)
    apart = pack_ue8m0(scale).T.contiguous().T
    assert not apart.is_contiguous()
    assert torch.equal(unpack_ue8m0(apart, 8), scale)
    one_column = apart[:, :1]
    assert one_column.stride() == (1, 3)
    assert torch.equal(unpack_ue8m0(one_column, 4), scale[:, :4])


# Rows.


def rows_by_the_rule(
    rows: np.ndarray, power_of_two: bool, vendor: VendorConversions
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition of one row, group by group, with numpy and the vendor's conversions."""
    codes, scales = [], []
    for start in range(0, len(rows), GROUP):
        group = rows[start : start + GROUP]
        scale = np.maximum(np.abs(group).max(), np.float32(1e-10)) / np.float32(448)
        if power_of_two:
            exponent = int(vendor.to_ue8m0(torch.tensor([scale]))[0])
            scale = np.float32(2.0) ** (exponent - 127)
        product = group * (np.float32(1) / scale)
        codes.append(vendor.to_e4m3(torch.from_numpy(product)))
        scales.append(float(scale))
    return torch.cat(codes), torch.tensor(scales)


@pytest.mark.parametrize("scale_format", FORMATS)
@pytest.mark.parametrize("columns", [1, 128, 200, 512])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_follow_the_rule(
    vendor: VendorConversions, scale_format: ScaleFormat, columns: int, dtype: torch.dtype
) -> None:
    spread = 10 ** normal(1, 64, 1)
    hidden = (normal(0, 64, columns) * spread).to(dtype)
    values, scale = quantise_fp8_rows(hidden, scale_format)
    assert values.shape == (64, columns)
    assert scale.shape == (64, -(-columns // GROUP))
    for row in range(64):
        expected_values, expected_scale = rows_by_the_rule(
            hidden[row].float().numpy(), scale_format is ScaleFormat.UE8M0, vendor
        )
        same_bytes(values[row], expected_values)
        assert torch.equal(scale[row], expected_scale)


@given(seeds, st.integers(1, 300), magnitudes, st.sampled_from(FORMATS))
def test_rows_come_back_within_half_a_step(
    seed: int, columns: int, magnitude: float, scale_format: ScaleFormat
) -> None:
    hidden = normal(seed, 3, columns) * magnitude
    values, scale = quantise_fp8_rows(hidden, scale_format)
    back = dequantise_fp8_rows(values, scale, torch.float64)
    step = scale.double().repeat_interleave(GROUP, dim=-1)[:, :columns]
    # Half of the distance of neighbours: 2**-4 of a normal value, 2**-10 below; and float32's own.
    bound = torch.maximum(hidden.double().abs() * 2**-4, step * 2**-10) * (1 + 1e-5)
    assert bool(((back - hidden.double()).abs() <= bound).all())
    assert bool((scale > 0).all())


@given(seeds, st.integers(1, 3))
def test_rounding_the_scale_comes_before_the_values(seed: int, groups: int) -> None:
    hidden = normal(seed, 2, groups * GROUP)
    values, scale = quantise_fp8_rows(hidden, ScaleFormat.UE8M0)
    assert torch.equal(scale, ceil_to_ue8m0(quantise_fp8_rows(hidden)[1]))
    largest = values.float().abs().unflatten(-1, (groups, GROUP)).amax(dim=-1)
    assert bool((largest <= E4M3_MAX).all())
    # With a scale less than twice as large as necessary, but for the rounding of the largest.
    assert bool((largest >= E4M3_MAX / 2 * (1 - 2**-4)).all())


@pytest.mark.parametrize(
    ("scale_format", "expected"),
    [(ScaleFormat.FLOAT32, 1e-10 / 448), (ScaleFormat.UE8M0, 2.0**-42)],
)
def test_a_zero_row_gives_zeros_and_a_positive_scale(
    scale_format: ScaleFormat, expected: float
) -> None:
    values, scale = quantise_fp8_rows(torch.zeros(2, 130), scale_format)
    assert not bytes_of(values).any()
    assert_close(scale, torch.full((2, 2), expected), rtol=1e-6, atol=0)


@pytest.mark.parametrize("scale_format", FORMATS)
def test_values_saturate_and_do_not_become_nan(scale_format: ScaleFormat) -> None:
    hidden = random_floats(MILLION, (-120, 127)).view(-1, GROUP)
    values, scale = quantise_fp8_rows(hidden, scale_format)
    assert bool(values.float().isfinite().all())
    assert bool(scale.isfinite().all())


def test_a_nan_spoils_its_group_alone() -> None:
    hidden = normal(0, 1, 2 * GROUP)
    hidden[0, 3] = float("nan")
    back = dequantise_fp8_rows(*quantise_fp8_rows(hidden))
    assert bool(back[0, :GROUP].isnan().all())
    assert_close(back[0, GROUP:], hidden[0, GROUP:], rtol=2**-4, atol=1e-2)


@pytest.mark.parametrize("scale_format", FORMATS)
@pytest.mark.parametrize("shape", [(0, 256), (2, 0, 130), (2, 3, 130)])
def test_shapes_without_and_with_leading_dimensions(
    shape: tuple[int, ...], scale_format: ScaleFormat
) -> None:
    values, scale = quantise_fp8_rows(normal(0, *shape), scale_format)
    assert values.shape == shape
    assert scale.shape == (*shape[:-1], 2)
    assert dequantise_fp8_rows(values, scale, torch.bfloat16).shape == shape


def test_no_e4m3_scales() -> None:
    with pytest.raises(QuantizationConfigError, match="no e4m3 scales"):
        quantise_fp8_rows(torch.ones(1, 128), ScaleFormat.E4M3)


# Blocks.


def transformers_setting(scale_format: ScaleFormat) -> SimpleNamespace:
    scale_fmt = "ue8m0" if scale_format is ScaleFormat.UE8M0 else None
    config = SimpleNamespace(weight_block_size=(GROUP, GROUP), scale_fmt=scale_fmt)
    return SimpleNamespace(quantization_config=config)


@pytest.mark.parametrize("scale_format", FORMATS)
def test_blocks_are_those_of_transformers(scale_format: ScaleFormat) -> None:
    weight = normal(0, 2, 256, 384) * 10 ** normal(1, 2, 256, 1)
    values, scale = quantise_fp8_block(weight, scale_format)
    theirs = Fp8Quantize(transformers_setting(scale_format)).convert({"a.weight": weight})
    assert_close(scale, theirs["a.weight_scale_inv"].float(), rtol=2**-22, atol=0)
    # They take the reciprocal of another quotient, so a value near a tie may fall to either side.
    distance = bytes_of(values).int() - bytes_of(theirs["a.weight"]).int()
    assert int(distance.abs().max()) <= 1
    assert int(distance.count_nonzero()) <= weight.numel() // 1000


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_come_back_as_in_transformers(dtype: torch.dtype) -> None:
    values, scale = quantise_fp8_block(normal(0, 2, 256, 384))
    theirs = Fp8Dequantize(transformers_setting(ScaleFormat.FLOAT32))
    expected = theirs._dequantize_one(values, scale, dtype)
    assert torch.equal(dequantise_fp8_block(values, scale, dtype), expected)


@pytest.mark.parametrize("scale_format", FORMATS)
def test_a_block_one_row_high_is_a_group(scale_format: ScaleFormat) -> None:
    weight = normal(0, 200, 1, 200).bfloat16()
    values, scale = quantise_fp8_block(weight, scale_format)
    row_values, row_scale = quantise_fp8_rows(weight, scale_format)
    same_bytes(values, row_values)
    assert torch.equal(scale, row_scale)


@given(seeds, st.integers(1, 260), st.integers(1, 260), st.sampled_from(FORMATS))
def test_blocks_at_the_edges_are_smaller(
    seed: int, rows: int, columns: int, scale_format: ScaleFormat
) -> None:
    weight = normal(seed, rows, columns)
    values, scale = quantise_fp8_block(weight, scale_format)
    assert scale.shape == (-(-rows // GROUP), -(-columns // GROUP))
    back = dequantise_fp8_block(values, scale)
    for block_row in range(scale.shape[0]):
        for block_column in range(scale.shape[1]):
            where = (
                slice(block_row * GROUP, (block_row + 1) * GROUP),
                slice(block_column * GROUP, (block_column + 1) * GROUP),
            )
            alone, alone_scale = quantise_fp8_block(weight[where], scale_format)
            same_bytes(values[where], alone)
            assert alone_scale.item() == scale[block_row, block_column].item()
            assert torch.equal(back[where], alone.float() * alone_scale)


@given(seeds)
def test_quantising_what_was_dequantised_changes_nothing(seed: int) -> None:
    values, scale = quantise_fp8_block(normal(seed, 130, 128), ScaleFormat.UE8M0)
    once = dequantise_fp8_block(values, scale)
    assert torch.equal(dequantise_fp8_block(*quantise_fp8_block(once, ScaleFormat.UE8M0)), once)
