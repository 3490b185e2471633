"""Every weight scheme: the tensors it stores, and how near the weight comes back."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st

from mortise.errors import QuantizationConfigError
from mortise.formats.integer import to_offset_binary
from mortise.formats.weights import (
    INT4_SCHEMES,
    STATIC_INPUT_SCHEMES,
    dequantise_weight,
    quantise_weight,
    stored_layout,
)
from mortise.spec.weights import ScaleFormat, StoredWeight, WeightScheme

# Neither rows nor columns fill blocks of 128, nor do the rows of each half.
ROWS, COLUMNS = 296, 144
GROUP_SIZE = 24
SCHEMES_IN_GROUPS = tuple(sorted(INT4_SCHEMES))
FLOATS = (torch.float32, torch.bfloat16)


def weight_of(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Weights whose second half of rows is a hundred times the first, as gate and up may be."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(5)) / 64
    weight[..., shape[-2] // 2 :, :] *= 100
    return weight.to(dtype)


def tensors_of(stored: StoredWeight) -> dict[str, torch.Tensor]:
    values = {field.name: getattr(stored, field.name) for field in fields(stored)}
    return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}


def allowed_error(stored: StoredWeight, weight: torch.Tensor) -> torch.Tensor:
    """Half the distance between the neighbours of each value, from the published formats.

    ``weight`` is ``[N, K]`` of a single part.
    """
    size = weight.float().abs()
    scale = None if stored.scale is None else stored.scale.float()
    match stored.scheme:
        case WeightScheme.FLOAT:
            return torch.zeros_like(size)
        case WeightScheme.FP8_BLOCK:
            assert scale is not None
            blocks = scale.repeat_interleave(128, -2).repeat_interleave(128, -1)
            rows, columns = weight.shape
            return torch.maximum(size / 16, blocks[:rows, :columns] / 1024)
        case WeightScheme.W8A8 | WeightScheme.W4A8 | WeightScheme.W4A4 | WeightScheme.W4A16:
            assert scale is not None
            return scale.repeat_interleave(weight.shape[-1] // scale.shape[-1], -1) / 2
        case WeightScheme.NVFP4:
            assert scale is not None
            assert stored.global_scale is not None
            step = scale.repeat_interleave(16, -1) * stored.global_scale
            floor = (stored.global_scale * 6 / 1024).expand_as(size)
            return torch.maximum(torch.maximum(size / 5, step / 4), floor)
    raise AssertionError(f"no error bound for {stored.scheme}: say what the scheme guarantees")


@pytest.mark.parametrize("leading", [(), (3,)], ids=["one", "experts"])
@pytest.mark.parametrize("num_parts", [1, 2])
@pytest.mark.parametrize("scheme", WeightScheme)
def test_every_scheme_stores_what_it_says(
    scheme: WeightScheme, num_parts: int, leading: tuple[int, ...]
) -> None:
    weight = weight_of(*leading, ROWS, COLUMNS)
    static = scheme in STATIC_INPUT_SCHEMES
    stored = quantise_weight(
        weight,
        scheme,
        group_size=GROUP_SIZE if scheme in INT4_SCHEMES else None,
        num_parts=num_parts,
        input_scale=torch.ones(*leading, num_parts) if static else None,
    )
    layout = stored_layout(
        scheme,
        ROWS,
        COLUMNS,
        num_groups=COLUMNS // GROUP_SIZE if scheme in INT4_SCHEMES else 1,
        num_parts=num_parts,
        static_input=static,
    )
    found = {name: (tuple(t.shape), t.dtype) for name, t in tensors_of(stored).items()}
    assert found == {name: ((*leading, *shape), dtype) for name, (shape, dtype) in layout.items()}
    assert (stored.scheme, stored.num_parts) == (scheme, num_parts)
    assert all(tensor.is_contiguous() for tensor in tensors_of(stored).values())


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        (WeightScheme.FLOAT, {"weight": ((300, 272), torch.float32)}),
        (
            WeightScheme.FP8_BLOCK,
            {
                "weight": ((300, 272), torch.float8_e4m3fn),
                # 150 rows a part are two blocks each: 4, where 300 rows in one would be 3.
                "scale": ((4, 3), torch.float32),
            },
        ),
        (
            WeightScheme.W8A8,
            {
                "weight": ((300, 272), torch.int8),
                "scale": ((300, 1), torch.float32),
                "input_scale": ((2,), torch.float32),
                "input_offset": ((2,), torch.float32),
            },
        ),
        *(
            (
                scheme,
                {"weight": ((300, 34), torch.int32), "scale": ((300, 4), torch.float32)},
            )
            for scheme in SCHEMES_IN_GROUPS
        ),
        (
            WeightScheme.NVFP4,
            {
                "weight": ((300, 136), torch.uint8),
                "scale": ((300, 17), torch.float8_e4m3fn),
                "global_scale": ((2,), torch.float32),
                "input_scale": ((2,), torch.float32),
            },
        ),
    ],
)
def test_layout(scheme: WeightScheme, expected: dict[str, object]) -> None:
    static = scheme in STATIC_INPUT_SCHEMES
    layout = stored_layout(
        scheme,
        300,
        272,
        num_groups=4 if scheme in INT4_SCHEMES else 1,
        num_parts=2,
        static_input=static,
        asymmetric_input=scheme is WeightScheme.W8A8,
        float_dtype=torch.float32,
    )
    assert dict(layout) == expected
    assert set(layout) <= {field.name for field in fields(StoredWeight)}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("group_size", [None, GROUP_SIZE])
@pytest.mark.parametrize("scheme", WeightScheme)
def test_weights_come_back(
    scheme: WeightScheme, group_size: int | None, dtype: torch.dtype
) -> None:
    group_size = group_size if scheme in INT4_SCHEMES else None
    weight = weight_of(ROWS, COLUMNS, dtype=dtype)
    stored = quantise_weight(weight, scheme, group_size=group_size)
    back = dequantise_weight(stored)
    assert (back.shape, back.dtype) == (weight.shape, torch.float32)
    assert (back - weight.float()).abs().le(allowed_error(stored, weight) * 1.0001).all()
    assert dequantise_weight(stored, torch.bfloat16).equal(back.bfloat16())


@settings(max_examples=40)
@given(
    scheme=st.sampled_from(WeightScheme),
    rows=st.integers(1, 5),
    blocks=st.integers(1, 4),
    seed=st.integers(0, 2**31),
    exponent=st.integers(-20, 20),
)
def test_weights_of_any_size_come_back(
    scheme: WeightScheme, rows: int, blocks: int, seed: int, exponent: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, 16 * blocks, generator=generator) * 2.0**exponent
    weight[:, ::3] = 0
    stored = quantise_weight(weight, scheme)
    back = dequantise_weight(stored)
    assert (back - weight).abs().le(allowed_error(stored, weight) * 1.0001).all()
    assert back[:, ::3].eq(0).all()


@pytest.mark.parametrize("scheme", WeightScheme)
def test_parts_and_experts_are_stored_as_if_alone(scheme: WeightScheme) -> None:
    weight = weight_of(3, ROWS, COLUMNS)
    together = quantise_weight(weight, scheme, num_parts=2)
    alone = [
        [quantise_weight(part, scheme) for part in expert.chunk(2, dim=0)] for expert in weight
    ]
    for name, tensor in tensors_of(together).items():
        expected = torch.stack(
            [torch.cat([tensors_of(part)[name] for part in expert]) for expert in alone]
        )
        assert tensor.view(torch.uint8).equal(expected.view(torch.uint8)), name
    back = dequantise_weight(together)
    assert back.equal(
        torch.stack([torch.cat([dequantise_weight(part) for part in expert]) for expert in alone])
    )


def test_parts_of_nvfp4_have_global_scales_of_their_own() -> None:
    weight = weight_of(2, ROWS, COLUMNS)
    stored = quantise_weight(weight, WeightScheme.NVFP4, num_parts=2)
    amax = weight.float().unflatten(1, (2, -1)).abs().amax(dim=(2, 3))
    assert stored.global_scale is not None
    assert stored.global_scale.equal(amax / torch.tensor(2688.0))
    first, second = stored.global_scale.unbind(-1)
    assert (second > 10 * first).all()
    # One global scale for both would be lossless in range, but the records differ.
    merged = quantise_weight(weight, WeightScheme.NVFP4)
    assert merged.global_scale is not None
    assert merged.global_scale.squeeze(-1).equal(second)


def test_blocks_of_rows_do_not_cross_parts() -> None:
    weight = torch.ones(200, 16)
    weight[100:] = 448
    stored = quantise_weight(weight, WeightScheme.FP8_BLOCK, num_parts=2)
    assert stored.scale is not None
    torch.testing.assert_close(stored.scale, torch.tensor([[1 / 448], [1.0]]))
    assert dequantise_weight(stored)[100:].eq(448).all()


def test_scales_of_float8_may_be_powers_of_two() -> None:
    weight = weight_of(ROWS, COLUMNS)
    exact = quantise_weight(weight, WeightScheme.FP8_BLOCK)
    stored = quantise_weight(weight, WeightScheme.FP8_BLOCK, scale_format=ScaleFormat.UE8M0)
    assert stored.scale_format is ScaleFormat.UE8M0
    assert stored.scale is not None
    assert exact.scale is not None
    mantissa, _ = stored.scale.frexp()
    assert mantissa.eq(0.5).all()
    assert stored.scale.ge(exact.scale).all()
    assert stored.scale.lt(2 * exact.scale).all()
    error = (dequantise_weight(stored) - weight.float()).abs()
    assert error.le(allowed_error(stored, weight)).all()


def arguments(**settings: Any) -> QuantizationArgs:
    return QuantizationArgs(symmetric=True, **settings)


def described(weights: QuantizationArgs) -> QuantizationScheme:
    return QuantizationScheme(targets=["Linear"], weights=weights)


@pytest.mark.parametrize("group_size", [None, GROUP_SIZE])
@pytest.mark.parametrize("scheme", SCHEMES_IN_GROUPS)
def test_int4_is_read_by_compressed_tensors(scheme: WeightScheme, group_size: int | None) -> None:
    stored = quantise_weight(weight_of(ROWS, COLUMNS), scheme, group_size=group_size)
    strategy = "channel" if group_size is None else "group"
    checkpoint = {
        "weight_packed": to_offset_binary(stored.weight),
        "weight_scale": stored.scale,
        "weight_shape": torch.tensor([ROWS, COLUMNS]),
    }
    theirs = PackedQuantizationCompressor.decompress(
        checkpoint,
        described(arguments(num_bits=4, type="int", strategy=strategy, group_size=group_size)),
    )
    assert dequantise_weight(stored).equal(theirs["weight"])


def test_nvfp4_is_read_by_compressed_tensors() -> None:
    stored = quantise_weight(weight_of(ROWS, COLUMNS), WeightScheme.NVFP4)
    assert stored.global_scale is not None
    checkpoint = {
        "weight_packed": stored.weight,
        "weight_scale": stored.scale,
        "weight_global_scale": stored.global_scale.reciprocal(),
    }
    theirs = NVFP4PackedCompressor.decompress(
        checkpoint,
        described(arguments(num_bits=4, type="float", strategy="tensor_group", group_size=16)),
    )
    # They divide the block's scale by the reciprocal in the dtype they unpack to.
    dtype = theirs["weight"].dtype
    torch.testing.assert_close(
        dequantise_weight(stored), theirs["weight"].float(), rtol=3 * torch.finfo(dtype).eps, atol=0
    )


def test_float8_is_read_by_compressed_tensors() -> None:
    stored = quantise_weight(weight_of(ROWS, COLUMNS), WeightScheme.FP8_BLOCK)
    assert stored.scale is not None
    theirs = dequantize(
        stored.weight.float(),
        stored.scale,
        args=arguments(num_bits=8, type="float", strategy="block", block_structure=[128, 128]),
    )
    assert dequantise_weight(stored).equal(theirs)


def test_a_float_weight_is_kept_as_it_is() -> None:
    weight = weight_of(4, 8)
    assert quantise_weight(weight, WeightScheme.FLOAT).weight is weight


@pytest.mark.parametrize("scheme", WeightScheme)
def test_zeros_come_back_as_zeros(scheme: WeightScheme) -> None:
    stored = quantise_weight(torch.zeros(6, 32), scheme, num_parts=2)
    assert dequantise_weight(stored).eq(0).all()
    if stored.scale is not None and scheme is not WeightScheme.NVFP4:
        assert stored.scale.gt(0).all()


@pytest.mark.parametrize("scheme", sorted(STATIC_INPUT_SCHEMES))
def test_a_static_input_scale_is_handed_on(scheme: WeightScheme) -> None:
    input_scale = torch.tensor([0.25, 0.5])
    stored = quantise_weight(weight_of(4, 16), scheme, num_parts=2, input_scale=input_scale)
    assert stored.input_scale is input_scale
    # It belongs to the input: the weight does not change with it.
    assert dequantise_weight(stored).equal(dequantise_weight(replace(stored, input_scale=None)))


@pytest.mark.parametrize(
    ("scheme", "shape", "options", "message"),
    [
        (WeightScheme.W4A16, (4, 12), {}, "12 is no multiple of 8"),
        (WeightScheme.W4A8, (4, 4), {}, "4 is no multiple of 8"),
        (WeightScheme.W4A4, (4, 40), {"group_size": 16}, "40 is no multiple of 16"),
        (WeightScheme.W4A4, (4, 40), {"group_size": 0}, "40 is no multiple of 0"),
        (WeightScheme.NVFP4, (4, 40), {}, "40 is no multiple of 16"),
        (WeightScheme.NVFP4, (5, 16), {"num_parts": 2}, "5 is no multiple of 2"),
        (WeightScheme.FP8_BLOCK, (5, 16), {"num_parts": 2}, "5 is no multiple of 2"),
        (WeightScheme.W8A8, (4, 16), {"group_size": 8}, "w8a8 are to have scales for groups"),
        (WeightScheme.FLOAT, (4, 16), {"group_size": 1}, "float are to have scales for groups"),
        (
            WeightScheme.W8A8,
            (4, 16),
            {"scale_format": ScaleFormat.UE8M0},
            "w8a8 are to have scales of format ue8m0",
        ),
        (
            WeightScheme.FP8_BLOCK,
            (4, 16),
            {"scale_format": ScaleFormat.E4M3},
            "fp8_block are to have scales of format e4m3",
        ),
        (
            WeightScheme.W4A16,
            (4, 16),
            {"input_scale": torch.ones(1)},
            "w4a16 are to have a static scale of their input",
        ),
    ],
)
def test_weights_that_a_scheme_cannot_store(
    scheme: WeightScheme, shape: tuple[int, int], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(QuantizationConfigError, match=message):
        quantise_weight(torch.ones(shape), scheme, **options)


@pytest.mark.parametrize(
    ("scheme", "sizes", "options", "message"),
    [
        (WeightScheme.W4A16, (4, 12), {}, "12 is no multiple of 8"),
        (WeightScheme.W4A16, (4, 16), {"num_groups": 3}, "16 is no multiple of 3"),
        (WeightScheme.NVFP4, (4, 24), {}, "24 is no multiple of 16"),
        (WeightScheme.NVFP4, (3, 16), {"num_parts": 2}, "3 is no multiple of 2"),
        (WeightScheme.W8A8, (4, 16), {"num_groups": 2}, "w8a8 are to have scales for groups"),
        (WeightScheme.FLOAT, (4, 16), {"static_input": True}, "float are to have a static scale"),
        (
            WeightScheme.NVFP4,
            (4, 16),
            {"static_input": True, "asymmetric_input": True},
            "nvfp4 are to have an offset",
        ),
        (
            WeightScheme.W8A8,
            (4, 16),
            {"asymmetric_input": True},
            "w8a8 are to have an offset",
        ),
    ],
)
def test_layouts_that_do_not_exist(
    scheme: WeightScheme, sizes: tuple[int, int], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(QuantizationConfigError, match=message):
        stored_layout(scheme, *sizes, **options)
