"""Quantisation of tensors by given scales."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from mortise_npu_ascend.emulator.chip import current_chip
from mortise_npu_ascend.emulator.generation import Generation
from mortise_npu_ascend.emulator.numbers import QINT8, QINT32, QUINT4X2, QUINT8, dtype_of
from mortise_npu_ascend.emulator.rejections import (
    device_name,
    not_emulated,
    require,
    require_dtype,
)
from mortise_npu_ascend.emulator.rounding import to_integers
from mortise_npu_ascend.emulator.storage import storage_format, tag
from mortise_npu_ascend.emulator.words import VALUES_PER_WORD, pack_words

if TYPE_CHECKING:
    from collections.abc import Callable

BY_DIVISION: Final = "aclnnQuantize"
BY_PRODUCT: Final = "aclnnAscendQuantV3"
OPERATOR: Final = "npu_quantize"

_FLOATS: Final = (torch.float32, torch.float16, torch.bfloat16)


def npu_quantize(
    input: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor | None,
    dtype: int,
    axis: int = 1,
    div_mode: bool = True,
) -> torch.Tensor:
    """Quantise by given scales: rint(x / scales + zero_points), or x * scales without ``div_mode``.

    Saturates. Arithmetic is float32.

    Args:
        input: float32, float16 or bfloat16 of any shape.
        scales: ``[1]``, or as long as ``axis``.
        zero_points: of the shape of ``scales``.
        dtype: ``qint8``, ``quint8`` or ``qint32``; without ``div_mode`` ``qint8`` or ``quint4x2``.
        axis: that the scales lie along; without ``div_mode`` -2, or else the last.
        div_mode: whether to divide.

    Returns:
        int8, uint8 or int32 of the same shape; int32 ``[..., H/8]`` for ``quint4x2``, stored as
        the input is.
    """
    if div_mode:
        return _quantise_by_division(input, scales, zero_points, dtype, axis)
    return _quantise_by_product(input, scales, zero_points, dtype, axis if axis < -1 else -1)


OPERATORS: Final[tuple[tuple[str, Callable[..., object]], ...]] = ((OPERATOR, npu_quantize),)


def _quantise_by_division(
    rows: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor | None,
    dtype: int,
    axis: int,
) -> torch.Tensor:
    wanted = {QINT8: torch.int8, QUINT8: torch.uint8, QINT32: torch.int32}.get(dtype)
    wanted = wanted or dtype_of(dtype)
    require(
        wanted in (torch.int8, torch.uint8, torch.int32),
        OPERATOR,
        "Param (dtype) must be Int8, UInt8, Int32, HiFloat8, Float8_e4m3fn, Float8_e5m2; "
        f"of those the emulator has the integers, got {wanted or dtype}",
    )
    assert wanted is not None
    _check_division(rows, scales, zero_points, axis)
    values = rows.float() / _along(rows, scales, axis)
    if zero_points is not None:
        values = values + _along(rows, zero_points, axis)
    limits = torch.iinfo(wanted)
    return values.double().round().clamp(limits.min, limits.max).nan_to_num(0.0).to(wanted)


def _check_division(
    rows: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor | None,
    axis: int,
) -> None:
    require_dtype(rows, "x", _FLOATS, OPERATOR, kernel=BY_DIVISION)
    require_dtype(scales, "scales", _FLOATS, OPERATOR, kernel=BY_DIVISION)
    # A bfloat16 among scales and zero points asks for bfloat16 everywhere.
    dtypes = {scales.dtype}
    if zero_points is not None:
        offsets: tuple[torch.dtype, ...] = (torch.int8, torch.uint8, torch.int32, torch.bfloat16)
        if current_chip().generation is Generation.A5:
            offsets = (*offsets, torch.float32)
        require_dtype(zero_points, "zeroPoints", offsets, OPERATOR, kernel=BY_DIVISION)
        dtypes.add(zero_points.dtype)
    require(
        torch.bfloat16 not in dtypes or dtypes | {rows.dtype} == {torch.bfloat16},
        OPERATOR,
        f"x is {device_name(rows.dtype)}, scales are {device_name(scales.dtype)}: expected dtype "
        "DT_BFLOAT16 of all where one is",
        kernel=BY_DIVISION,
    )
    require(
        scales.ndim == 1,
        OPERATOR,
        "Input scales shape only support 1 dimension.",
        kernel=BY_DIVISION,
    )
    require(
        zero_points is None or zero_points.shape == scales.shape,
        OPERATOR,
        "Scales size should be equal to zeroPoints size.",
        kernel=BY_DIVISION,
    )
    if len(scales) == 1:
        return
    require(
        -rows.ndim <= axis < rows.ndim,
        OPERATOR,
        f"Axis out of range (expected to be in range of [-{rows.ndim}, {rows.ndim - 1}], but got "
        f"{axis})",
        kernel=BY_DIVISION,
    )
    require(
        len(scales) == rows.shape[axis],
        OPERATOR,
        "The size of scales must equal to 1 or the specified dimension of x, which is "
        f"{rows.shape[axis]}; it is {len(scales)}",
        kernel=BY_DIVISION,
    )


def _quantise_by_product(
    rows: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor | None,
    dtype: int,
    axis: int,
) -> torch.Tensor:
    int4 = dtype == QUINT4X2 or dtype_of(dtype) is torch.int32
    if not int4 and dtype != QINT8 and dtype_of(dtype) is not torch.int8:
        not_emulated(OPERATOR, f"dtype {dtype_of(dtype) or dtype} without div_mode")
    if int4:
        require(
            rows.shape[-1] % VALUES_PER_WORD == 0,
            OPERATOR,
            f"Input shape last dim must be divded by 8, got {rows.shape[-1]}",
        )
    _check_product(rows, scales, zero_points, axis)
    values = rows.float() * _along(rows, scales, axis)
    if zero_points is not None:
        values = values + _along(rows, zero_points, axis)
    if not int4:
        return to_integers(values, -128, 127)
    words = pack_words(to_integers(values, -8, 7))
    return tag(words, storage_format(rows))


def _check_product(
    rows: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor | None,
    axis: int,
) -> None:
    require_dtype(rows, "x", _FLOATS, OPERATOR, kernel=BY_PRODUCT)
    require_dtype(scales, "scale", _FLOATS, OPERATOR, kernel=BY_PRODUCT)
    if zero_points is not None:
        require(
            zero_points.dtype is scales.dtype and zero_points.shape == scales.shape,
            OPERATOR,
            "scale and offset have different dtypes or shapes: expected dtype "
            f"{device_name(scales.dtype)} and {tuple(scales.shape)} of both, offset is "
            f"{device_name(zero_points.dtype)} {tuple(zero_points.shape)}",
            kernel=BY_PRODUCT,
        )
    require(
        rows.dtype is torch.float32 or rows.dtype is scales.dtype,
        OPERATOR,
        f"dtype of input x:{device_name(rows.dtype)} is not compatible with "
        f"scale:{device_name(scales.dtype)}.",
        kernel=BY_PRODUCT,
    )
    require(
        rows.ndim >= -axis,
        OPERATOR,
        f"invalid axis: {axis}, axis can't exceed the dimension of x: {rows.ndim}",
        kernel=BY_PRODUCT,
    )
    require(
        scales.ndim in {1, rows.ndim},
        OPERATOR,
        "scale dimNum must be same as x dimNum or 1.",
        kernel=BY_PRODUCT,
    )
    require(
        scales.numel() == scales.shape[0 if scales.ndim == 1 else axis]
        and scales.numel() in {1, rows.shape[axis]},
        OPERATOR,
        f"scale dim's value is invalid, should be same as x dim({axis})'s value"
        f"({rows.shape[axis]}) or 1, the others 1; scale is {tuple(scales.shape)}",
        kernel=BY_PRODUCT,
    )


def _along(rows: torch.Tensor, parameters: torch.Tensor, axis: int) -> torch.Tensor:
    """Float32 parameters, shaped so that they lie along one axis of the rows."""
    if parameters.numel() == 1:
        return parameters.float().reshape(())
    shape = [1] * rows.ndim
    shape[axis] = parameters.numel()
    return parameters.float().reshape(shape)
