"""NVFP4, judged by the vendor's headers, by compressed-tensors and by arithmetic in float64."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from compressed_tensors.compressors.nvfp4 import (
    NVFP4PackedCompressor,
    pack_fp4_to_uint8,
    unpack_fp4_from_uint8,
)
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import quantize
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from compressed_tensors.quantization.utils.fp4_utils import cast_to_fp4
from hypothesis import given
from hypothesis import strategies as st
from tests.fixtures.float_values import bytes_of, random_floats, rounding_classes
from torch.testing import assert_close

from mortise.errors import QuantizationConfigError
from mortise.formats.nvfp4 import (
    BLOCK,
    dequantise_nvfp4,
    from_e2m1,
    global_scale_of,
    multiplier_from_divisor,
    pack_e2m1,
    quantise_nvfp4,
    quantise_nvfp4_by_divisor,
    swizzle_scales,
    to_e2m1,
    unpack_e2m1,
    unswizzle_scales,
)

if TYPE_CHECKING:
    from tests.fixtures.vendor_conversions import VendorConversions

MILLION = 1 << 20
ALL_CODES = torch.arange(16, dtype=torch.uint8)
THEIR_ARGS = QuantizationArgs(
    num_bits=4,
    type="float",
    strategy="tensor_group",
    group_size=BLOCK,
    scale_dtype=torch.float8_e4m3fn,
)
seeds = st.integers(0, 2**31 - 1)


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_codes(seed: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(16, shape, generator=generator, dtype=torch.uint8)


# Conversion.


@pytest.mark.parametrize(
    "values",
    [
        pytest.param(rounding_classes(), id="every class"),
        pytest.param(random_floats(MILLION, (-127, 128)), id="any bits"),
        pytest.param(random_floats(MILLION, (-4, 3)), id="in range"),
    ],
)
def test_conversion_is_the_vendors(vendor: VendorConversions, values: torch.Tensor) -> None:
    assert_close(to_e2m1(values), vendor.to_e2m1(values), rtol=0, atol=0)


def test_conversion_of_every_bfloat16_is_the_vendors(vendor: VendorConversions) -> None:
    values = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    assert torch.equal(to_e2m1(values), vendor.to_e2m1(values.float()))


def test_conversion_is_that_of_compressed_tensors() -> None:
    values = torch.cat((rounding_classes(), random_floats(MILLION, (-4, 3))))
    values = values[values.isfinite()]
    assert torch.equal(from_e2m1(to_e2m1(values)), cast_to_fp4(values.clone()))


def test_every_code_means_what_the_vendor_says(vendor: VendorConversions) -> None:
    values = from_e2m1(ALL_CODES)
    assert torch.equal(bytes_of(values), bytes_of(vendor.from_e2m1(ALL_CODES)))
    assert torch.equal(to_e2m1(values), ALL_CODES)


@pytest.mark.parametrize(
    ("value", "code"),
    [
        (0.25, 0),  # each half-way value, to the even code
        (0.75, 2),
        (1.25, 2),
        (1.75, 4),
        (2.5, 4),
        (3.5, 6),
        (5.0, 6),
        (0.2500001, 1),
        (5.000001, 7),
        (1e30, 7),
        (float("inf"), 7),
        (1e-45, 0),
        (0.0, 0),
    ],
)
@pytest.mark.parametrize("sign", [0, 8])
def test_ties_subnormals_and_saturation(value: float, code: int, sign: int) -> None:
    assert to_e2m1(torch.tensor([-value if sign else value])).tolist() == [code | sign]


def test_nan_becomes_the_largest() -> None:
    assert to_e2m1(torch.tensor([float("nan"), -float("nan")])).tolist() == [7, 7]


# Packing.


def test_the_even_column_lies_in_the_low_nibble(vendor: VendorConversions) -> None:
    values = torch.tensor([[1.0, 6.0], [-0.5, 0.0]])
    packed = pack_e2m1(to_e2m1(values))
    assert packed.tolist() == [[0x72], [0x09]]
    assert torch.equal(packed, vendor.pack_e2m1(values))


@given(seeds, st.integers(0, 4), st.integers(1, 20))
def test_packing_is_that_of_compressed_tensors(seed: int, rows: int, pairs: int) -> None:
    codes = random_codes(seed, rows, 2 * pairs)
    packed = pack_e2m1(codes)
    assert torch.equal(packed, pack_fp4_to_uint8(from_e2m1(codes)))
    assert torch.equal(unpack_e2m1(packed), codes)
    theirs = unpack_fp4_from_uint8(packed, rows, 2 * pairs, dtype=torch.float32)
    assert torch.equal(from_e2m1(unpack_e2m1(packed)), theirs)


def test_an_odd_number_of_columns_cannot_be_packed() -> None:
    with pytest.raises(QuantizationConfigError, match="5 is no multiple of 2"):
        pack_e2m1(random_codes(0, 3, 5))


# Global scale.


@given(st.floats(2.0**-100, 2.0**100, width=32))
def test_the_global_scale_is_the_reciprocal_of_compressed_tensors(amax: float) -> None:
    largest = torch.tensor([amax])
    theirs = generate_gparam(-largest, largest)
    for ours in (global_scale_of(largest), multiplier_from_divisor(theirs)):
        assert_close(ours.double(), largest.double() / 2688, rtol=2**-23, atol=0)
    assert_close(multiplier_from_divisor(global_scale_of(largest)), theirs, rtol=2**-22, atol=0)


@pytest.mark.parametrize("amax", [0.0, 1e-45, 1e-36, float("inf"), float("nan")])
def test_the_global_scale_is_one_where_there_is_none(amax: float) -> None:
    assert global_scale_of(torch.tensor(amax)).item() == 1.0


# Rows and weights.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_quantising_is_the_recipe_with_the_vendors_conversions(
    vendor: VendorConversions, dtype: torch.dtype, spread: float
) -> None:
    """2**20 values of each kind; rows on their own scales, block scales of every size."""
    hidden = normal(0, 1024, 1024) * 10 ** (spread * normal(1, 1024, 1024))
    hidden = (hidden * 10 ** normal(2, 1024, 1)).to(dtype)
    divisor = multiplier_from_divisor(global_scale_of(hidden.abs().amax(dim=-1, keepdim=True)))
    packed, scale = quantise_nvfp4_by_divisor(hidden, divisor)
    expected = vendor.quantise_nvfp4(hidden.float(), divisor.expand(scale.shape))
    assert torch.equal(bytes_of(scale), expected[1])
    assert torch.equal(packed, expected[0])


def test_the_global_scale_is_inverted_once_on_the_way_in(vendor: VendorConversions) -> None:
    hidden = normal(0, 64, 256)
    for amax in (1.0, 3.0, 4.7, 300.0):
        global_scale = global_scale_of(torch.tensor(amax))
        packed, scale = quantise_nvfp4(hidden, global_scale)
        divisor = (1 / global_scale).expand(scale.shape)
        expected = vendor.quantise_nvfp4(hidden, divisor)
        assert torch.equal(packed, expected[0])
        assert torch.equal(bytes_of(scale), expected[1])
        again, scale_again = quantise_nvfp4(hidden, global_scale.item())
        assert torch.equal(packed, again)
        assert torch.equal(bytes_of(scale), bytes_of(scale_again))


def test_compressed_tensors_quantises_alike() -> None:
    """They divide by scale / divisor; we multiply by the reciprocal: a few codes fall otherwise."""
    weight = normal(0, 256, 1024)
    divisor = generate_gparam(weight.amin(), weight.amax())
    packed, scale = quantise_nvfp4_by_divisor(weight, divisor)
    blocks = weight.unflatten(-1, (-1, BLOCK))
    theirs, _ = calculate_qparams(blocks.amin(-1), blocks.amax(-1), THEIR_ARGS, divisor)
    differing_scales = int((scale.float() != theirs.float()).sum())
    assert differing_scales <= scale.numel() // 1000
    same_scales = quantize(
        weight, scale.float(), None, THEIR_ARGS, dtype=torch.float32, global_scale=divisor
    )
    differs = from_e2m1(unpack_e2m1(packed)) != same_scales
    assert int(differs.sum()) <= weight.numel() // 1000
    neighbours = to_e2m1(same_scales).int() - unpack_e2m1(packed).int()
    assert int(neighbours.abs().max()) <= 1


def test_compressed_tensors_reads_what_we_write() -> None:
    weight = normal(0, 64, 256)
    global_scale = global_scale_of(weight.abs().amax())
    packed, scale = quantise_nvfp4(weight, global_scale)
    theirs = NVFP4PackedCompressor.decompress(
        {
            "weight_packed": packed,
            "weight_scale": scale,
            "weight_global_scale": multiplier_from_divisor(global_scale).reshape(1),
        },
        QuantizationScheme(targets=["Linear"], weights=THEIR_ARGS),
    )
    ours = dequantise_nvfp4(packed, scale, global_scale, theirs["weight"].dtype)
    # They round the scale and the values to bfloat16, each once.
    assert_close(ours, theirs["weight"], rtol=2**-7, atol=0)


@given(seeds, st.integers(1, 6), st.floats(-3, 3), st.floats(0, 2))
def test_values_come_back_within_half_a_step(
    seed: int, blocks: int, exponent: float, spread: float
) -> None:
    hidden = normal(seed, 4, blocks * BLOCK) * 10**exponent
    hidden = hidden * 10 ** (spread * normal(seed + 1, 4, blocks * BLOCK))
    global_scale = global_scale_of(hidden.abs().amax())
    packed, scale = quantise_nvfp4(hidden, global_scale)
    back = dequantise_nvfp4(packed, scale, global_scale, torch.float64)
    step = (scale.double() * global_scale.double()).repeat_interleave(BLOCK, dim=-1)
    in_steps = hidden.double() / step
    in_range = (step > 0) & (in_steps.abs() <= 6)
    error = (back - hidden.double()).abs()
    # Neighbours are a half, one or two steps apart.
    half = torch.where(in_steps.abs() <= 2, 0.25, torch.where(in_steps.abs() <= 4, 0.5, 1.0))
    assert bool((error <= half * step * (1 + 1e-5))[in_range].all())
    # Above 6 steps: the block scale was rounded down, by half of its distance at most.
    assert bool(
        (error <= 0.5 * step * (1 + 1e-5))[(step > 0) & ~in_range & normal_scale(scale)].all()
    )


def normal_scale(scale: torch.Tensor) -> torch.Tensor:
    """Where the e4m3 scale is no subnormal, spread over its columns."""
    return (scale.float() >= 2**-6).repeat_interleave(BLOCK, dim=-1)


def test_a_block_too_small_for_its_scale_is_zero() -> None:
    hidden = torch.cat((torch.full((1, BLOCK), -1e-9), torch.ones(1, BLOCK)), dim=-1)
    packed, scale = quantise_nvfp4(hidden, global_scale_of(torch.tensor(1.0)))
    assert bytes_of(scale).tolist() == [[0, 0x7E]]
    assert packed.tolist() == [[0x88] * 8 + [0x77] * 8]
    back = dequantise_nvfp4(packed, scale, global_scale_of(torch.tensor(1.0)))
    assert_close(back, hidden, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("global_scale", [1.0, 2.0**-126])
def test_zeros_stay_zeros(global_scale: float) -> None:
    """Under the smallest scales, too, where the reciprocal is not a finite float32."""
    hidden = torch.zeros(2, 2 * BLOCK)
    hidden[0, 0] = global_scale / 100
    packed, scale = quantise_nvfp4(hidden, global_scale)
    assert_close(
        dequantise_nvfp4(packed, scale, global_scale), hidden, rtol=0.1, atol=0.1 * global_scale
    )
    assert not packed[1].any()
    assert not packed[:, 1:].any()


def test_scales_saturate_beyond_the_calibrated_range() -> None:
    packed, scale = quantise_nvfp4(
        torch.full((1, BLOCK), 100.0), global_scale_of(torch.tensor(1.0))
    )
    assert scale.float().tolist() == [[448.0]]
    assert packed.tolist() == [[0x77] * 8]


def test_each_expert_under_its_own_scale() -> None:
    weight = normal(0, 3, 4, 64) * torch.tensor([1.0, 10.0, 1e-3]).view(3, 1, 1)
    global_scale = global_scale_of(weight.abs().amax(dim=(-2, -1), keepdim=True))
    packed, scale = quantise_nvfp4(weight, global_scale)
    back = dequantise_nvfp4(packed, scale, global_scale)
    for expert in range(3):
        alone, alone_scale = quantise_nvfp4(weight[expert], global_scale[expert])
        assert torch.equal(packed[expert], alone)
        assert torch.equal(bytes_of(scale[expert]), bytes_of(alone_scale))
        assert torch.equal(back[expert], dequantise_nvfp4(alone, alone_scale, global_scale[expert]))


@pytest.mark.parametrize("shape", [(0, 32), (2, 0, 16), (32,)])
def test_no_rows_and_no_leading_dimension(shape: tuple[int, ...]) -> None:
    packed, scale = quantise_nvfp4(torch.ones(shape), 1.0)
    assert packed.shape == (*shape[:-1], shape[-1] // 2)
    assert scale.shape == (*shape[:-1], shape[-1] // BLOCK)
    assert dequantise_nvfp4(packed, scale, 1.0, torch.bfloat16).shape == shape


def test_columns_come_in_whole_blocks() -> None:
    with pytest.raises(QuantizationConfigError, match="24 is no multiple of 16"):
        quantise_nvfp4(torch.ones(1, 24), 1.0)


# Swizzled scales.


@given(st.integers(1, 300), st.integers(1, 13))
def test_every_scale_stands_at_its_published_place(rows: int, columns: int) -> None:
    """The offset that cuBLAS documents for block scales of 128 x 4."""
    scale = torch.arange(1, rows * columns + 1, dtype=torch.int32).view(rows, columns)
    flat = swizzle_scales(scale)
    row_tiles, column_tiles = -(-rows // 128), -(-columns // 4)
    assert flat.shape == (row_tiles * column_tiles * 512,)
    row, column = torch.arange(rows)[:, None], torch.arange(columns)
    tile = row // 128 * column_tiles + column // 4
    offset = tile * 512 + row % 32 * 16 + row % 128 // 32 * 4 + column % 4
    assert torch.equal(flat[offset], scale)
    assert int(flat.count_nonzero()) == rows * columns
    assert torch.equal(unswizzle_scales(flat, rows, columns), scale)


def test_swizzling_keeps_dtype_and_leading_dimensions() -> None:
    scale = normal(0, 3, 130, 6).abs().to(torch.float8_e4m3fn)
    flat = swizzle_scales(scale)
    assert flat.dtype == torch.float8_e4m3fn
    assert flat.shape == (3, 256 * 8)
    assert torch.equal(bytes_of(flat[1]), bytes_of(swizzle_scales(scale[1])))
    assert torch.equal(bytes_of(unswizzle_scales(flat, 130, 6)), bytes_of(scale))
