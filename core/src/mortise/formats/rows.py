"""Rows as they travel to the experts: into a dispatch format, out of it, and their memory."""

# ``...`` is R received rows or ``[E_l, capacity]``, H the hidden size. A number of rows of 0 is
# legal everywhere.

from __future__ import annotations

from typing import TYPE_CHECKING, assert_never

import torch

from mortise.errors import ContractError
from mortise.formats.fp8 import (
    GROUP,
    dequantise_fp8_rows,
    pack_ue8m0,
    quantise_fp8_rows,
    unpack_ue8m0,
)
from mortise.formats.integer import dequantise_int, quantise_int_rows, require_divisible
from mortise.formats.layout import TensorLayout
from mortise.formats.nvfp4 import BLOCK, dequantise_nvfp4, quantise_nvfp4
from mortise.spec.consumer import format_problem, scales_in_words
from mortise.spec.dispatch import DispatchDtype
from mortise.spec.reasons import ReasonCode
from mortise.spec.weights import ScaleFormat

if TYPE_CHECKING:
    from mortise.spec.dispatch import DispatchFormat


def quantise_rows(
    hidden: torch.Tensor, format: DispatchFormat
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Bring rows into a dispatch format.

    Args:
        hidden: ``[..., H]``, float32 or bfloat16; of the format's dtype where that is unquantised.
        format: what the rows are to be.

    Returns:
        Rows and scales as :func:`row_tensors` describes them; unquantised rows are ``hidden``
        itself, without scales.

    Raises:
        ContractError: the format contradicts itself, or it sends rows as they are and ``hidden``
            has another dtype.
        QuantizationConfigError: H is no multiple of the format's block.
    """
    check_format(format)
    match format.dtype:
        case DispatchDtype.FP32 | DispatchDtype.BF16:
            return _as_is(hidden, format), None
        case DispatchDtype.INT8:
            return quantise_int_rows(hidden, 8)
        case DispatchDtype.FP8_E4M3:
            assert format.scale_format is not None
            rows, scales = quantise_fp8_rows(hidden, format.scale_format)
            packed = format.scale_format is ScaleFormat.UE8M0
            return rows, pack_ue8m0(scales) if packed else scales
        case DispatchDtype.NVFP4:
            assert format.global_scale is not None
            return quantise_nvfp4(hidden, format.global_scale)
        case _:
            assert_never(format.dtype)


def dequantise_rows(
    rows: torch.Tensor, scales: torch.Tensor | None, format: DispatchFormat, dtype: torch.dtype
) -> torch.Tensor:
    """Bring rows of a dispatch format back to ``[..., H]`` of ``dtype``; products in float32.

    Raises:
        ContractError: the format contradicts itself, or the rows lack its scales.
    """
    check_format(format)
    match format.dtype:
        case DispatchDtype.FP32 | DispatchDtype.BF16:
            return rows.to(dtype)
        case DispatchDtype.INT8:
            return dequantise_int(rows, _present(scales, format).unsqueeze(-1), dtype)
        case DispatchDtype.FP8_E4M3:
            scales = _present(scales, format)
            if format.scale_format is ScaleFormat.UE8M0:
                scales = unpack_ue8m0(scales, _ceil_div(rows.shape[-1], GROUP))
            return dequantise_fp8_rows(rows, scales, dtype)
        case DispatchDtype.NVFP4:
            assert format.global_scale is not None
            return dequantise_nvfp4(rows, _present(scales, format), format.global_scale, dtype)
        case _:
            assert_never(format.dtype)


def row_tensors(
    format: DispatchFormat, hidden_size: int
) -> tuple[TensorLayout, TensorLayout | None]:
    """Say what one row of H columns looks like, and its scales: for the buffers of an exchange.

    Shapes lack the leading dimensions; the scale of int8 rows has shape ``()``.

    Raises:
        ContractError: the format contradicts itself.
        QuantizationConfigError: H is no multiple of the format's block.
    """
    check_format(format)
    match format.dtype:
        case DispatchDtype.FP32 | DispatchDtype.BF16:
            return TensorLayout((hidden_size,), _unquantised_dtype(format)), None
        case DispatchDtype.INT8:
            return TensorLayout((hidden_size,), torch.int8), TensorLayout((), torch.float32)
        case DispatchDtype.FP8_E4M3:
            return TensorLayout((hidden_size,), torch.float8_e4m3fn), _fp8_scales(
                format, hidden_size
            )
        case DispatchDtype.NVFP4:
            require_divisible(hidden_size, BLOCK, "blocks of columns")
            return (
                TensorLayout((hidden_size // 2,), torch.uint8),
                TensorLayout((hidden_size // BLOCK,), torch.float8_e4m3fn),
            )
        case _:
            assert_never(format.dtype)


def check_format(format: DispatchFormat) -> None:
    """Raise where a format's scales are not such as its rows can have.

    Raises:
        ContractError: with the scales stated and those possible.
    """
    problem = format_problem(format)
    if problem:
        what, expected = problem
        raise ContractError(what, reason=ReasonCode.CONTRACT_BROKEN, expected=expected)


def _unquantised_dtype(format: DispatchFormat) -> torch.dtype:
    return torch.float32 if format.dtype is DispatchDtype.FP32 else torch.bfloat16


def _as_is(hidden: torch.Tensor, format: DispatchFormat) -> torch.Tensor:
    if hidden.dtype is not _unquantised_dtype(format):
        raise ContractError(
            f"{hidden.dtype} rows are to be sent as {format.dtype.value}",
            reason=ReasonCode.CONTRACT_BROKEN,
            expected=f"rows of {_unquantised_dtype(format)}: they are sent as they are",
        )
    return hidden


def _present(scales: torch.Tensor | None, format: DispatchFormat) -> torch.Tensor:
    if scales is None:
        raise ContractError(
            f"{format.dtype.value} rows came without scales",
            reason=ReasonCode.CONTRACT_BROKEN,
            expected=scales_in_words(format.scale_layout, format.scale_format),
        )
    return scales


def _fp8_scales(format: DispatchFormat, hidden_size: int) -> TensorLayout:
    groups = _ceil_div(hidden_size, GROUP)
    if format.scale_format is ScaleFormat.UE8M0:
        return TensorLayout((_ceil_div(groups, 4),), torch.int32)
    return TensorLayout((groups,), torch.float32)


def _ceil_div(size: int, divisor: int) -> int:
    return -(-size // divisor)
