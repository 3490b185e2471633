"""What the matrix unit's output stage does with int32 sums: scale words, fp16 and int8 results."""

# Sources: AscendC's fixpipe as ops-transformer's grouped kernels drive it, and the vendor's own
# test reference in ops-nn (matmul_quant_util). M rows, N columns, K inner axis, G groups of K.

from __future__ import annotations

from typing import Final

import torch

from mortise_npu_ascend.emulator.words import scale_of_words

WORD_DTYPES: Final = frozenset({torch.int64, torch.uint64})
"""Of scales that travel as words: torch_npu takes int64, the vendor's library calls it uint64."""

# The unit multiplies by a float of 19 bits: sign, eight of exponent, ten of mantissa.
_KEPT_BITS: Final = -(1 << 13)
_OFFSET_SHIFT: Final = 37
_OFFSET_SPAN: Final = 1 << 9


def nineteen_bits(scale: torch.Tensor) -> torch.Tensor:
    """A float32 scale with its 13 lowest mantissa bits cleared: towards zero by up to 2**-10."""
    return scale.float().contiguous().view(torch.int32).bitwise_and(_KEPT_BITS).view(torch.float32)


def offset_of_words(words: torch.Tensor) -> torch.Tensor:
    """The signed nine bits 37 to 45 of int64 words, as float32."""
    if words.dtype == torch.uint64:
        words = words.contiguous().view(torch.int64)
    raw = (words >> _OFFSET_SHIFT) & (_OFFSET_SPAN - 1)
    return torch.where(raw >= _OFFSET_SPAN // 2, raw - _OFFSET_SPAN, raw).float()


def word_scale(words: torch.Tensor, *, truncate: bool) -> torch.Tensor:
    """The float32 scale in words; ``truncate`` also clears what the unit does not use of it."""
    scale = scale_of_words(words)
    return nineteen_bits(scale) if truncate else scale


def integer_sums(rows_MK: torch.Tensor, weight_KN: torch.Tensor) -> torch.Tensor:
    """The exact product of integers, as float64 ``[M, N]``.

    Exact because |sum| <= 2**14 * K stays far below 2**53.
    """
    return rows_MK.double() @ weight_KN.double()


def to_int8(sums_MN: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """Requantise: sum times scale, rounded to nine bits, plus the offset, saturated to int8.

    Args:
        sums_MN: integers in float64.
        scale: float32, broadcasts against the sums.
        offset: integers in -256..255 in float32, broadcasts.
    """
    scaled = (sums_MN.float() * scale).round().clamp(-256, 255)
    return (scaled + offset).clamp(-128, 127).to(torch.int8)


def sums_in_half(
    rows_MK: torch.Tensor, weight_KN: torch.Tensor, scale_GN: torch.Tensor
) -> torch.Tensor:
    """Products of G groups of the inner axis, each scaled and written as fp16, added up in fp16.

    A scaled sum above 65504 becomes infinite, however small the scale that follows.

    Args:
        rows_MK: integers.
        weight_KN: integers.
        scale_GN: float32.

    Returns:
        fp16 ``[M, N]``.
    """
    num_groups = len(scale_GN)
    total = torch.zeros(len(rows_MK), weight_KN.shape[1], dtype=torch.float16)
    for rows, weight, scale in zip(
        rows_MK.chunk(num_groups, dim=1), weight_KN.chunk(num_groups), scale_GN, strict=True
    ):
        total += (integer_sums(rows, weight).float() * scale).half()
    return total
