"""``npu_quant_matmul``: the product of quantised rows with one quantised weight."""

# M rows, K inner axis, N columns.

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from mortise_npu_ascend.emulator.fixpipe import (
    WORD_DTYPES,
    integer_sums,
    nineteen_bits,
    offset_of_words,
    to_int8,
    word_scale,
)
from mortise_npu_ascend.emulator.grouped_call import row_values, weight_values
from mortise_npu_ascend.emulator.numbers import dtype_of
from mortise_npu_ascend.emulator.quant_matmul_checks import OPERATOR, check
from mortise_npu_ascend.emulator.rejections import not_emulated, reject

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


def npu_quant_matmul(
    x1: torch.Tensor,
    x2: torch.Tensor,
    scale: torch.Tensor,
    *,
    offset: torch.Tensor | None = None,
    pertoken_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    output_dtype: int | None = None,
    x1_dtype: int | None = None,
    x2_dtype: int | None = None,
    pertoken_scale_dtype: int | None = None,
    scale_dtype: int | None = None,
    group_sizes: Sequence[int] | None = None,
    y_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Exact sums, times the column's scale, times the row's, plus the bias.

    An int32 bias is added to the sums, any other after the scales. **Without ``output_dtype`` the
    result is int8.** For int8 and fp16 results without ``pertoken_scale``, torch_npu turns a
    float32 scale into a word, so that only 19 bits of it count. int32 results are the sums: the
    scale has no effect.

    Args:
        x1: int8 ``[..., M, K]``, or int4 words ``[..., M, K/8]``.
        x2: int8 ``[..., K, N]``, or int4 words ``[K, N/8]``, or ``[K/8, N]`` in a transposed view.
        scale: float32, bf16 or int64 words, ``[1]`` or ``[N]``.
        offset: float32 ``[1]`` or ``[N]``, for int8 results.
        pertoken_scale: float32 ``[M]``.
        bias: int32, bf16, fp16 or float32, ``[N]`` or ``[B, 1, N]``.
        output_dtype: int8, fp16, bf16 or int32.
        x1_dtype: None, like the other five: they are of modes that are not emulated.
        x2_dtype: None.
        pertoken_scale_dtype: None.
        scale_dtype: None.
        group_sizes: None.
        y_scale: None.

    Returns:
        ``[..., M, N]``.

    Raises:
        RuntimeError: the chip does not take the arguments together.
    """
    if {x1_dtype, x2_dtype, pertoken_scale_dtype, scale_dtype} != {None}:
        not_emulated(OPERATOR, "a dtype that torch lacks")
    if y_scale is not None or (group_sizes is not None and any(size > 1 for size in group_sizes)):
        not_emulated(OPERATOR, "a product with groups of K")
    out_dtype = torch.int8 if output_dtype is None else dtype_of(output_dtype)
    if out_dtype is None:
        reject(OPERATOR, f"Not supported output dtype is {output_dtype}")
    check(x1, x2, scale, offset, pertoken_scale, bias, out_dtype)
    sums = integer_sums(row_values(x1), weight_values(x2))
    if bias is not None and bias.dtype == torch.int32:
        sums, bias = sums + bias, None
    if out_dtype == torch.int32:
        return sums.to(torch.int32)
    if pertoken_scale is None and out_dtype in (torch.int8, torch.float16):
        return _by_output_stage(sums, scale, offset, out_dtype)
    is_words = scale.dtype in WORD_DTYPES
    result = sums.float() * (word_scale(scale, truncate=True) if is_words else scale.float())
    if pertoken_scale is not None:
        result = result * pertoken_scale[:, None]
    if bias is not None:
        result = result + bias.float()
    return result.to(out_dtype)


def _by_output_stage(
    sums: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor | None, out_dtype: torch.dtype
) -> torch.Tensor:
    """What needs no vector unit: one multiplication by 19 bits, an offset of nine."""
    if scale.dtype in WORD_DTYPES:
        used, shift = word_scale(scale, truncate=True), offset_of_words(scale)
    else:
        used, shift = nineteen_bits(scale), torch.zeros(1)
    if offset is not None:
        shift = offset.round().clamp(-256, 255)
    if out_dtype == torch.int8:
        return to_int8(sums, used, shift)
    return (sums.float() * used).to(out_dtype)


OPERATORS: Final[tuple[tuple[str, Callable[..., object]], ...]] = ((OPERATOR, npu_quant_matmul),)
