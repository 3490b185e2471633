"""Quantisation of rows by their own range."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NoReturn

import torch

from mortise_npu_ascend.emulator.chip import current_chip
from mortise_npu_ascend.emulator.generation import Generation
from mortise_npu_ascend.emulator.numbers import QUINT4X2, dtype_of
from mortise_npu_ascend.emulator.poison import poison_rows
from mortise_npu_ascend.emulator.rejections import (
    device_name,
    not_emulated,
    reject,
    require,
    require_dtype,
)
from mortise_npu_ascend.emulator.rounding import by_largest, group_of_each_row, to_integers
from mortise_npu_ascend.emulator.words import VALUES_PER_WORD, pack_words

if TYPE_CHECKING:
    from collections.abc import Callable

KERNEL: Final = "aclnnDynamicQuantV2"

_HALF: Final = (torch.float16, torch.bfloat16)
# What the asymmetric quantiser divides by where a row has no range.
_LEAST_SCALE: Final = 1e-12


def npu_dynamic_quant(
    input: torch.Tensor,
    *,
    smooth_scales: torch.Tensor | None = None,
    group_index: torch.Tensor | None = None,
    dst_type: int | None = None,
    quant_mode: str = "pertoken",
    dst_type_max: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise symmetrically: by the largest magnitude of a row, of a column or of everything.

    Arithmetic is float32. With smooth scales, the product is taken first.

    Args:
        input: float16 or bfloat16 ``[..., M, H]``.
        smooth_scales: of the same dtype, ``[H]``, or ``[E, H]`` with ``group_index``.
        group_index: int32 ``[E]``, where the rows of each group end.
        dst_type: None or int8, or ``quint4x2`` for words of eight int4 values.
        quant_mode: ``pertoken``; on A5 also ``pertensor`` and ``perchannel``.
        dst_type_max: only 0 is emulated.

    Returns:
        int8 of the same shape or int32 ``[..., M, H/8]``, and float32 scales ``[..., M]`` (``[1]``
        per tensor, ``[..., H]`` per channel). Rows behind the last group are poison.
    """
    operator = "npu_dynamic_quant"
    largest = _check_dynamic(
        operator, input, smooth_scales, group_index, dst_type, quant_mode, dst_type_max
    )
    values, written = _smoothed(input, smooth_scales, group_index)
    axes = {"pertoken": (-1,), "perchannel": (-2,), "pertensor": tuple(range(input.ndim))}
    newest = current_chip().generation is Generation.A5
    integers, scale = by_largest(values, largest, axes[quant_mode], divide=newest)
    scale = scale.reshape(1) if quant_mode == "pertensor" else scale.squeeze(axes[quant_mode])
    result = _packed_if(largest == 7, integers)
    return _poison_behind(result, input.ndim - 1, written), _poison_behind(
        scale, scale.ndim, written
    )


def npu_dynamic_quant_asymmetric(
    input: torch.Tensor,
    *,
    smooth_scales: torch.Tensor | None = None,
    group_index: torch.Tensor | None = None,
    dst_type: int | None = None,
    quant_mode: str = "pertoken",
    dst_type_max: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantise each row by its range, with an offset.

    For int8 scale = max((max - min) / 255, 1e-12), offset = 127 - max / scale, and value =
    rint(x * (1 / scale) + offset); for int4 with 15 and 7.

    Args:
        input: float16 or bfloat16 ``[..., M, H]``.
        smooth_scales: as for :func:`npu_dynamic_quant`.
        group_index: as for :func:`npu_dynamic_quant`.
        dst_type: as for :func:`npu_dynamic_quant`.
        quant_mode: only ``pertoken`` is emulated.
        dst_type_max: only 0 is emulated.

    Returns:
        int8 or int32 words, float32 scales ``[..., M]`` and offsets ``[..., M]``.
    """
    operator = "npu_dynamic_quant_asymmetric"
    largest = _check_dynamic(
        operator, input, smooth_scales, group_index, dst_type, quant_mode, dst_type_max
    )
    if quant_mode != "pertoken":
        not_emulated(operator, f"quant_mode {quant_mode!r}")
    values, written = _smoothed(input, smooth_scales, group_index)
    high, low = values.amax(dim=-1, keepdim=True), values.amin(dim=-1, keepdim=True)
    steps = torch.full_like(high, 2 * largest + 1)
    scale = ((high - low) / steps).clamp(min=_LEAST_SCALE)
    offset = largest - high / scale
    scaled = values * (torch.ones_like(scale) / scale) + offset
    integers = _packed_if(largest == 7, to_integers(scaled, -largest - 1, largest))
    rows = input.ndim - 1
    return (
        _poison_behind(integers, rows, written),
        _poison_behind(scale.squeeze(-1), rows, written),
        _poison_behind(offset.squeeze(-1), rows, written),
    )


OPERATORS: Final[tuple[tuple[str, Callable[..., object]], ...]] = (
    ("npu_dynamic_quant", npu_dynamic_quant),
    ("npu_dynamic_quant_asymmetric", npu_dynamic_quant_asymmetric),
)


def _check_dynamic(
    operator: str,
    rows: torch.Tensor,
    smooth_scales: torch.Tensor | None,
    group_index: torch.Tensor | None,
    dst_type: int | None,
    quant_mode: str,
    dst_type_max: float,
) -> int:
    """Refuse what the device refuses, and say what the largest integer is."""
    require(rows.ndim > 1, operator, "Input shape dim should be greater than 1")
    require_dtype(rows, "x", _HALF, operator, kernel=KERNEL)
    largest = _largest(operator, rows, dst_type)
    _check_mode(operator, quant_mode, dst_type_max)
    _check_smooth(operator, rows, smooth_scales, group_index, quant_mode)
    return largest


def _largest(operator: str, rows: torch.Tensor, dst_type: int | None) -> int:
    if dst_type == QUINT4X2:
        columns = rows.shape[-1]
        require(
            columns % VALUES_PER_WORD == 0,
            operator,
            f"Input shape last dim must be divded by 8 when int4 quantization, got {columns}",
        )
        return 7
    if dst_type is not None and dtype_of(dst_type) is not torch.int8:
        _refuse_dst_type(operator, dst_type)
    return 127


def _refuse_dst_type(operator: str, dst_type: int) -> NoReturn:
    wanted = dtype_of(dst_type)
    if current_chip().facts.float8:
        not_emulated(operator, f"dst_type {wanted or dst_type}")
    reject(
        operator,
        f"Tensor y not implemented for {device_name(wanted) if wanted else dst_type}, should be in "
        "dtype support list [DT_INT8,DT_INT32,DT_INT4]",
        kernel=KERNEL,
    )


def _check_mode(operator: str, quant_mode: str, dst_type_max: float) -> None:
    modes = ("pertoken", "pertensor", "perchannel")
    require(
        quant_mode in modes,
        operator,
        f"quantMode is invalid, must be pertoken, pertensor or perchannel, got {quant_mode!r}",
        kernel=KERNEL,
    )
    newest = current_chip().generation is Generation.A5
    if dst_type_max:
        require(newest, operator, "aclnnDynamicQuantV4 only support socVersion Ascend950")
        not_emulated(operator, f"dst_type_max {dst_type_max}")
    require(
        newest or quant_mode == "pertoken",
        operator,
        f"aclnnDynamicQuantV3 only support socVersion Ascend950, quant_mode is {quant_mode!r}",
    )


def _check_smooth(
    operator: str,
    rows: torch.Tensor,
    smooth_scales: torch.Tensor | None,
    group_index: torch.Tensor | None,
    quant_mode: str,
) -> None:
    if smooth_scales is None:
        require(
            group_index is None,
            operator,
            "group_index says which smooth_scales a row has, and there are none",
        )
        return
    if quant_mode != "pertoken":
        not_emulated(operator, f"smooth_scales with quant_mode {quant_mode!r}")
    require(
        smooth_scales.dtype is rows.dtype,
        operator,
        f"The dtypes of x and smooth_scales are not equal: {device_name(rows.dtype)} and "
        f"{device_name(smooth_scales.dtype)}",
        kernel=KERNEL,
    )
    if group_index is not None:
        require_dtype(group_index, "groupIndex", (torch.int32,), operator, kernel=KERNEL)
        require(
            group_index.ndim == 1,
            operator,
            f"The dimNum[{group_index.ndim}] of group_indexs should be equal to one.",
            kernel=KERNEL,
        )
    expected = (rows.shape[-1],) if group_index is None else (len(group_index), rows.shape[-1])
    require(
        smooth_scales.shape == expected,
        operator,
        f"The last dim[{rows.shape[-1]}] of x and the dim of smooth_scales shoule be equal: "
        f"smooth_scales is {tuple(smooth_scales.shape)}, expected {expected}",
        kernel=KERNEL,
    )


def _smoothed(
    rows: torch.Tensor, smooth_scales: torch.Tensor | None, group_index: torch.Tensor | None
) -> tuple[torch.Tensor, int | None]:
    """Float32 rows times their smooth scales, and how many are in a group (None: all)."""
    values = rows.float()
    if smooth_scales is None:
        return values, None
    if group_index is None:
        return values * smooth_scales.float(), None
    num_rows = rows.shape[:-1].numel()
    group = group_of_each_row(group_index, num_rows)
    factors = smooth_scales.float()[group.clamp(max=len(group_index) - 1)]
    return values * factors.view(rows.shape), int((group < len(group_index)).sum())


def _packed_if(int4: bool, integers: torch.Tensor) -> torch.Tensor:
    return pack_words(integers) if int4 else integers


def _poison_behind(result: torch.Tensor, row_dims: int, written: int | None) -> torch.Tensor:
    """Poison the rows, counted over the first ``row_dims`` axes, that are in no group."""
    if written is None:
        return result
    flat = result.contiguous().flatten(0, row_dims - 1)
    return poison_rows(flat, written).view(result.shape)
