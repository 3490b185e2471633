"""Rows go into every dispatch format and come back, whatever their number and arrangement."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8

from mortise.errors import ContractError, QuantizationConfigError
from mortise.formats.rows import dequantise_rows, quantise_rows, row_tensors
from mortise.reference.dispatch import resolve_dispatch_dtype
from mortise.spec.consumer import ROW_DTYPES, SCALE_DTYPES, SCALES
from mortise.spec.dispatch import (
    DispatchDtype,
    DispatchFormat,
    DispatchMode,
    DispatchRequest,
    ScaleLayout,
)
from mortise.spec.roles import ModelRole
from mortise.spec.weights import ScaleFormat, WeightScheme

HIDDEN = 176  # no multiple of 128, but of 16; its two groups of columns do not fill an int32
GLOBAL_SCALE = 5.0 / 2688

FORMATS = tuple(
    DispatchFormat(
        dtype=dtype,
        scale_layout=layout,
        scale_format=scale_format,
        global_scale=GLOBAL_SCALE if dtype is DispatchDtype.NVFP4 else None,
    )
    for dtype in DispatchDtype
    for layout, scale_format in sorted(SCALES[dtype], key=str)
)
SHAPES = ((7, HIDDEN), (0, HIDDEN), (3, 4, HIDDEN), (3, 0, HIDDEN), (2, 3, 2, HIDDEN))


def name(stated: DispatchFormat) -> str:
    return f"{stated.dtype.value}-{stated.scale_format}"


def rows_for(stated: DispatchFormat, shape: tuple[int, ...]) -> torch.Tensor:
    """Random rows of very different sizes; bfloat16 unless the format sends float32 as it is."""
    generator = torch.Generator().manual_seed(3)
    sizes = torch.rand((*shape[:-1], 1), generator=generator) ** 4
    hidden = (torch.randn(shape, generator=generator) * sizes).clamp(-5, 5)
    return hidden if stated.dtype is DispatchDtype.FP32 else hidden.bfloat16()


def allowed_error(
    hidden: torch.Tensor, scales: torch.Tensor | None, stated: DispatchFormat
) -> torch.Tensor | float:
    """Half the distance between the neighbours of each value, from the published formats."""
    if stated.dtype in {DispatchDtype.FP32, DispatchDtype.BF16}:
        return 0.0
    assert scales is not None
    x = hidden.float().abs()
    if stated.dtype is DispatchDtype.INT8:
        return scales.unsqueeze(-1) / 2
    if stated.dtype is DispatchDtype.FP8_E4M3:
        if stated.scale_format is ScaleFormat.UE8M0:
            scales = powers_of_two(scales)
        # Three bits of mantissa; below 2**-6 steps of 2**-9.
        return torch.maximum(x / 16, per_column(scales, 128) / 1024)
    if stated.dtype is DispatchDtype.NVFP4:
        step = per_column(scales.float(), 16) * GLOBAL_SCALE
        # At most a fifth of a value (5 between 4 and 6), a quarter of a step below 1; and the
        # scale of a block is itself a multiple of 2**-9, half of which the largest value may miss.
        floor = torch.full_like(x, 6 / 1024 * GLOBAL_SCALE)
        return torch.maximum(torch.maximum(x / 5, step / 4), floor)
    raise AssertionError(f"no error bound for {stated.dtype}: say what the format guarantees")


def per_column(scales: torch.Tensor, group: int) -> torch.Tensor:
    return scales.repeat_interleave(group, dim=-1)[..., :HIDDEN]


def powers_of_two(packed: torch.Tensor) -> torch.Tensor:
    """What torch's own e8m0 reads in the bytes."""
    return packed.view(torch.uint8)[..., :2].view(torch.float8_e8m0fnu).float()


def formats_of(dtype: DispatchDtype) -> list[DispatchFormat]:
    return [stated for stated in FORMATS if stated.dtype is dtype]


@pytest.mark.parametrize("dtype", DispatchDtype)
def test_every_dispatch_dtype_is_handled(dtype: DispatchDtype) -> None:
    for stated in formats_of(dtype):
        assert str(row_tensors(stated, HIDDEN)[0].dtype) == ROW_DTYPES[dtype]
    # What a layer is given when it asks for this format is one of them.
    decided = resolve_dispatch_dtype(
        DispatchRequest(
            role=ModelRole.MAIN,
            layer="model.layers.0.mlp.experts",
            mode=DispatchMode.NORMAL,
            override=None,
            scheme_w13=WeightScheme.FLOAT,
            scheme_w2=WeightScheme.FLOAT,
            accepted=(dtype,),
            requested=dtype,
            input_global_scale=GLOBAL_SCALE if dtype is DispatchDtype.NVFP4 else None,
            compute_dtype=torch.float32,
        )
    )
    assert decided.format in FORMATS


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("stated", FORMATS, ids=name)
def test_rows_come_back(stated: DispatchFormat, shape: tuple[int, ...]) -> None:
    hidden = rows_for(stated, shape)
    rows, scales = quantise_rows(hidden, stated)
    back = dequantise_rows(rows, scales, stated, torch.float32)
    assert (back.shape, back.dtype) == (shape, torch.float32)
    error = (back - hidden.float()).abs()
    assert error.le(allowed_error(hidden, scales, stated) * torch.tensor(1.0001)).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("stated", FORMATS, ids=name)
def test_rows_are_laid_out_as_stated(stated: DispatchFormat, shape: tuple[int, ...]) -> None:
    rows, scales = quantise_rows(rows_for(stated, shape), stated)
    row_layout, scale_layout = row_tensors(stated, HIDDEN)
    assert (rows.shape, rows.dtype) == ((*shape[:-1], *row_layout.shape), row_layout.dtype)
    assert (scales is None) is (scale_layout is None)
    if scales is not None and scale_layout is not None:
        assert scales.shape == (*shape[:-1], *scale_layout.shape)
        assert scales.dtype == scale_layout.dtype
        assert stated.scale_format is not None
        assert str(scales.dtype) == SCALE_DTYPES[stated.scale_format]


@pytest.mark.parametrize(
    ("hidden_size", "groups", "words"), [(16, 1, 1), (128, 1, 1), (512, 4, 1), (528, 5, 2)]
)
def test_scales_of_float8_fill_words(hidden_size: int, groups: int, words: int) -> None:
    by_format = {stated.scale_format: stated for stated in formats_of(DispatchDtype.FP8_E4M3)}
    rows = ((hidden_size,), torch.float8_e4m3fn)
    plain = row_tensors(by_format[ScaleFormat.FLOAT32], hidden_size)
    assert plain == (rows, ((groups,), torch.float32))
    packed = row_tensors(by_format[ScaleFormat.UE8M0], hidden_size)
    assert packed == (rows, ((words,), torch.int32))
    found = quantise_rows(torch.ones(2, hidden_size), by_format[ScaleFormat.UE8M0])[1]
    assert found is not None
    assert found.shape == (2, words)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stated", FORMATS, ids=name)
def test_rows_come_back_in_the_dtype_asked_for(stated: DispatchFormat, dtype: torch.dtype) -> None:
    rows, scales = quantise_rows(rows_for(stated, (4, HIDDEN)), stated)
    back = dequantise_rows(rows, scales, stated, dtype)
    assert back.equal(dequantise_rows(rows, scales, stated, torch.float32).to(dtype))
    assert back.dtype == dtype


@pytest.mark.parametrize("stated", FORMATS, ids=name)
def test_a_row_does_not_depend_on_its_neighbours(stated: DispatchFormat) -> None:
    hidden = rows_for(stated, (3, 4, HIDDEN))
    together = dequantise_rows(*quantise_rows(hidden, stated), stated, torch.float32)
    alone = [
        dequantise_rows(*quantise_rows(row.unsqueeze(0), stated), stated, torch.float32)
        for row in hidden.flatten(0, 1)
    ]
    assert torch.cat(alone).equal(together.flatten(0, 1))


@pytest.mark.parametrize("stated", FORMATS, ids=name)
def test_strided_and_zero_rows(stated: DispatchFormat) -> None:
    hidden = rows_for(stated, (2 * HIDDEN, 6)).T[:, ::2]
    hidden[1] = 0
    rows, scales = quantise_rows(hidden, stated)
    back = dequantise_rows(rows, scales, stated, torch.float32)
    assert back.equal(
        dequantise_rows(*quantise_rows(hidden.contiguous(), stated), stated, torch.float32)
    )
    assert back[1].eq(0).all()
    assert back[0].ne(0).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_rows_are_those_of_the_definition(dtype: torch.dtype) -> None:
    stated = formats_of(DispatchDtype.INT8)[0]
    hidden = rows_for(stated, (16, HIDDEN)).to(dtype)
    rows, scales = quantise_rows(hidden, stated)
    assert scales is not None
    x = hidden.float().numpy()
    amax = np.abs(x).max(axis=-1)
    np.testing.assert_array_equal(scales.numpy(), amax / np.float32(127))
    np.testing.assert_array_equal(rows.numpy(), np.rint(x * (np.float32(127) / amax)[:, None]))


def test_powers_of_two_are_rounded_up_before_quantising() -> None:
    exact = formats_of(DispatchDtype.FP8_E4M3)[0]
    rounded = replace(exact, scale_format=ScaleFormat.UE8M0)
    exact = replace(exact, scale_format=ScaleFormat.FLOAT32)
    hidden = rows_for(exact, (16, HIDDEN))
    _, scales = quantise_rows(hidden, exact)
    rows, packed = quantise_rows(hidden, rounded)
    assert scales is not None
    assert packed is not None
    powers = powers_of_two(packed)
    assert powers.ge(scales).all()
    assert powers.lt(scales * 2).all()
    # Columns past the second group have no scale: bytes of zero.
    assert packed.view(torch.uint8)[..., 2:].eq(0).all()
    values = rows.float() * per_column(powers, 128)
    assert dequantise_rows(rows, packed, rounded, torch.float32).equal(values)


def test_nvfp4_rows_are_read_by_compressed_tensors() -> None:
    stated = formats_of(DispatchDtype.NVFP4)[0]
    rows, scales = quantise_rows(rows_for(stated, (5, HIDDEN)), stated)
    assert scales is not None
    values = unpack_fp4_from_uint8(rows, 5, HIDDEN, dtype=torch.float32)
    expected = values * per_column(scales.float(), 16) * GLOBAL_SCALE
    torch.testing.assert_close(
        dequantise_rows(rows, scales, stated, torch.float32), expected, rtol=3e-7, atol=0
    )


@pytest.mark.parametrize("dtype", DispatchDtype)
def test_formats_that_contradict_themselves(dtype: DispatchDtype) -> None:
    sound = formats_of(dtype)[0]
    for layout, scale_format in product(ScaleLayout, (None, *ScaleFormat)):
        stated = replace(sound, scale_layout=layout, scale_format=scale_format)
        if (layout, scale_format) in SCALES[dtype]:
            row_tensors(stated, HIDDEN)
            continue
        with pytest.raises(ContractError, match=f"{dtype.value} rows states scales {layout.value}"):
            row_tensors(stated, HIDDEN)
        with pytest.raises(ContractError):
            quantise_rows(torch.zeros(1, HIDDEN), stated)
        with pytest.raises(ContractError):
            dequantise_rows(torch.zeros(1, HIDDEN), None, stated, torch.float32)


@pytest.mark.parametrize("dtype", DispatchDtype)
def test_the_global_scale_belongs_to_nvfp4(dtype: DispatchDtype) -> None:
    sound = formats_of(dtype)[0]
    other = None if dtype is DispatchDtype.NVFP4 else 0.5
    with pytest.raises(ContractError, match=f"global scale {other}"):
        quantise_rows(torch.zeros(1, HIDDEN), replace(sound, global_scale=other))


def test_unquantised_rows_are_sent_as_they_are() -> None:
    full, half = (DispatchFormat(dtype=dtype) for dtype in (DispatchDtype.FP32, DispatchDtype.BF16))
    hidden = torch.ones(2, HIDDEN)
    assert quantise_rows(hidden, full)[0] is hidden
    with pytest.raises(ContractError, match=r"torch\.float32 rows are to be sent as bf16"):
        quantise_rows(hidden, half)
    with pytest.raises(ContractError, match=r"torch\.bfloat16 rows are to be sent as fp32"):
        quantise_rows(hidden.bfloat16(), full)


@pytest.mark.parametrize("stated", FORMATS, ids=name)
def test_rows_without_their_scales(stated: DispatchFormat) -> None:
    rows, scales = quantise_rows(rows_for(stated, (2, HIDDEN)), stated)
    if scales is None:
        assert dequantise_rows(rows, None, stated, torch.float32).equal(rows.float())
        return
    with pytest.raises(ContractError, match=f"{stated.dtype.value} rows came without scales"):
        dequantise_rows(rows, None, stated, torch.float32)


def test_nvfp4_rows_need_whole_blocks() -> None:
    stated = formats_of(DispatchDtype.NVFP4)[0]
    with pytest.raises(QuantizationConfigError, match="40 is no multiple of 16"):
        quantise_rows(torch.zeros(1, 40), stated)
    with pytest.raises(QuantizationConfigError, match="40 is no multiple of 16"):
        row_tensors(stated, 40)
