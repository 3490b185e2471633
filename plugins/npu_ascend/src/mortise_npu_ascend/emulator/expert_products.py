"""One expert's product in each mode: the order of operations and of roundings of the kernels."""

# m rows of one expert, K inner axis, N columns, G groups of K. Everything after the sums is
# float32; the last step casts once to the dtype of the result, ties to even.

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

import torch
from torch.nn import functional

from mortise_npu_ascend.emulator.chip import current_chip
from mortise_npu_ascend.emulator.fixpipe import (
    WORD_DTYPES,
    integer_sums,
    offset_of_words,
    sums_in_half,
    to_int8,
    word_scale,
)
from mortise_npu_ascend.emulator.grouped_modes import GROUPED_FACTS, Mode

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


@dataclass(frozen=True)
class ExpertOperands:
    """What one expert's rows are multiplied with.

    Attributes:
        weight: ``[K, N]``; int4 as int8 values.
        bias: ``[N]``.
        scale: ``[N]`` or ``[G, N]``; float or words.
        offset: ``[N]`` or ``[1, N]``, float32, times the scale.
        antiquant_scale: ``[N]`` or ``[G, N]``.
        antiquant_offset: the same.
        row_scale: float32 ``[m, 1]``.
        act_type: see :data:`ACTIVATIONS`.
        out_dtype: of the result.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    scale: torch.Tensor | None
    offset: torch.Tensor | None
    antiquant_scale: torch.Tensor | None
    antiquant_offset: torch.Tensor | None
    row_scale: torch.Tensor | None
    act_type: int
    out_dtype: torch.dtype


def expert_product(mode: Mode, rows_mK: torch.Tensor, expert: ExpertOperands) -> torch.Tensor:
    """Multiply one expert's rows: ``[m, N]`` in the dtype of the result.

    Args:
        mode: of the call, whose checks were passed.
        rows_mK: floating-point or integer values, never words.
        expert: its operands.
    """
    return _PRODUCTS[mode](rows_mK, expert).to(expert.out_dtype)


def float_product(rows_mK: torch.Tensor, expert: ExpertOperands) -> torch.Tensor:
    """Accumulate in float32, add the bias."""
    return _plus(rows_mK.float() @ expert.weight.float(), expert.bias)


def int8_product(rows_mK: torch.Tensor, expert: ExpertOperands) -> torch.Tensor:
    """Exact sums and int32 bias; times the column's scale, then the row's; then a float bias."""
    sums_mN = integer_sums(rows_mK, expert.weight)
    bias = expert.bias
    if bias is not None and bias.dtype == torch.int32:
        sums_mN, bias = sums_mN + bias, None
    if expert.out_dtype == torch.int32:
        return sums_mN
    assert expert.scale is not None
    if expert.out_dtype == torch.int8:
        scale = word_scale(expert.scale, truncate=True)
        return to_int8(sums_mN, scale, offset_of_words(expert.scale))
    is_words = expert.scale.dtype in WORD_DTYPES
    scale = word_scale(expert.scale, truncate=True) if is_words else expert.scale.float()
    scaled = _plus(_times(sums_mN.float() * scale, expert.row_scale), bias)
    return _ACTIVATIONS[expert.act_type](scaled)


def int4_product(rows_mK: torch.Tensor, expert: ExpertOperands) -> torch.Tensor:
    """fp16 per group of K, added up in fp16; then float32 times the row's scale."""
    halves = sums_in_half(rows_mK, expert.weight, _scale_of_groups(expert))
    return _times(halves.float(), expert.row_scale)


def int4_weight_product(rows_mK: torch.Tensor, expert: ExpertOperands) -> torch.Tensor:
    """int8 rows with int4 weights, by the way of the generation."""
    if GROUPED_FACTS[current_chip().generation].assist_bias:
        return assisted_product(rows_mK, expert)
    return rescaled_product(rows_mK, expert)


def assisted_product(rows_mK: torch.Tensor, expert: ExpertOperands) -> torch.Tensor:
    """Two int4 halves of every row, 16 times the upper plus the lower plus the bias.

    The lower half is shifted by -8 to fit into int4. The bias gives that back: it must be 8 times
    the sum over K of weight times scale, and the kernel cannot see whether it is.
    """
    upper, lower = int4_halves(rows_mK)
    scale_GN = _scale_of_groups(expert)
    upper_mN = sums_in_half(upper, expert.weight, scale_GN).float()
    lower_mN = sums_in_half(lower, expert.weight, scale_GN).float()
    total = _plus(lower_mN + 16.0 * upper_mN, expert.bias)
    if expert.offset is not None:
        total = total + rows_mK.double().sum(dim=1, keepdim=True).float() * expert.offset
    return _times(total, expert.row_scale)


def rescaled_product(rows_mK: torch.Tensor, expert: ExpertOperands) -> torch.Tensor:
    """int4 times fp16 scales of groups of K, rounded to int8; then as with int8 weights."""
    assert expert.antiquant_scale is not None
    assert expert.scale is not None
    scale = _per_row(expert.antiquant_scale, len(expert.weight))
    weight = (expert.weight.half() * scale).round().to(torch.int32).to(torch.int8)
    scaled = integer_sums(rows_mK, weight).float() * expert.scale
    return _plus(_times(scaled, expert.row_scale), expert.bias)


def weight_only_product(rows_mK: torch.Tensor, expert: ExpertOperands) -> torch.Tensor:
    """Make the weights floating-point in the dtype of the rows; then as without quantisation."""
    assert expert.antiquant_scale is not None
    weight_KN = dequantised(
        expert.weight, expert.antiquant_scale, expert.antiquant_offset, rows_mK.dtype
    )
    return _plus(rows_mK.float() @ weight_KN.float(), expert.bias)


def dequantised(
    weight_KN: torch.Tensor,
    scale: torch.Tensor,
    offset: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """(weight + offset) * scale in ``dtype``.

    The vector units compute with fp16 but not with bf16: fp16 is rounded after each of the two
    operations, bf16 once, from float32.

    Args:
        weight_KN: integers.
        scale: ``[N]`` or ``[G, N]``.
        offset: the same, or None.
        dtype: fp16 or bf16.
    """
    compute = torch.float16 if dtype == torch.float16 else torch.float32
    values = weight_KN.to(compute)
    if offset is not None:
        values = values + _per_row(offset, len(values)).to(compute)
    return (values * _per_row(scale, len(values)).to(compute)).to(dtype)


def int4_halves(rows_mK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 rows as two of int4: floor(x / 16), and the four lowest bits minus 8."""
    return rows_mK >> 4, (rows_mK & 0xF) - 8


def _scale_of_groups(expert: ExpertOperands) -> torch.Tensor:
    """float32 ``[G, N]``; a strict chip uses only the bits that the matrix unit does."""
    assert expert.scale is not None
    scale = word_scale(expert.scale, truncate=current_chip().strict)
    return scale.reshape(-1, scale.shape[-1])


def _per_row(scale: torch.Tensor, inner: int) -> torch.Tensor:
    """``[N]`` as it is; ``[G, N]`` repeated to ``[K, N]``."""
    if scale.ndim == 1:
        return scale
    return scale.repeat_interleave(inner // len(scale), dim=0)


def _plus(values: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return values if bias is None else values + bias.float()


def _times(values: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    return values if scale is None else values * scale


def _gelu_by_tanh(values: torch.Tensor) -> torch.Tensor:
    return functional.gelu(values, approximate="tanh")


def _fast_gelu(values: torch.Tensor) -> torch.Tensor:
    return values * torch.sigmoid(1.702 * values)


def _unchanged(values: torch.Tensor) -> torch.Tensor:
    return values


_ACTIVATIONS: Final[Mapping[int, Callable[[torch.Tensor], torch.Tensor]]] = MappingProxyType(
    {
        0: _unchanged,
        1: functional.relu,
        2: _gelu_by_tanh,
        4: _fast_gelu,
        5: functional.silu,
    }
)

_PRODUCTS: Final[Mapping[Mode, Callable[[torch.Tensor, ExpertOperands], torch.Tensor]]] = (
    MappingProxyType(
        {
            Mode.FLOAT: float_product,
            Mode.A8W8: int8_product,
            Mode.A8W4: int4_weight_product,
            Mode.A4W4: int4_product,
            Mode.A16W8: weight_only_product,
            Mode.A16W4: weight_only_product,
        }
    )
)
