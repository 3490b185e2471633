"""Scales and int4 weights in the words that matrix units read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from mortise_npu_ascend.emulator.chip import current_chip
from mortise_npu_ascend.emulator.generation import Generation
from mortise_npu_ascend.emulator.rejections import not_emulated, require, require_dtype
from mortise_npu_ascend.emulator.storage import storage_format, tag
from mortise_npu_ascend.emulator.words import VALUES_PER_WORD, pack_words, scale_words

if TYPE_CHECKING:
    from collections.abc import Callable

SCALES: Final = "aclnnTransQuantParamV3"

# 13 of the 23 bits behind the point are not used by the unit that scales results.
_KEPT: Final = 0xFFFFE000
_DROPPED_BITS: Final = 13
_EXPONENT: Final = 0x7F800000
_SIGN: Final = 0x80000000
_QUANTISE: Final = 1 << 46
_OFFSET_SHIFT: Final = 37
_OFFSET_MASK: Final = 0x1FF


def npu_trans_quant_param(
    scale: torch.Tensor, offset: torch.Tensor | None = None, round_mode: int | None = 0
) -> torch.Tensor:
    """Write float32 scales, and offsets, as the words that quantised products take.

    Bits 0..31 are the scale as float32 of which 10 bits behind the point are left, bits 37..45 the
    rounded offset in -256..255 as two's complement, bit 46 is set. These are not the plain float32
    bits that int4 weights have.

    Args:
        scale: float32 ``[1]``, ``[N]`` or ``[1, N]``.
        offset: float32, ``[1]`` or ``[N]``, or of the shape of a ``[1, N]`` scale.
        round_mode: 0 drops the bits, 1 rounds ties to even (and subnormal scales to zero).

    Returns:
        int64 of the longer shape.
    """
    operator = "npu_trans_quant_param"
    require(
        scale.ndim == 1 or (scale.ndim == 2 and scale.shape[0] == 1),
        operator,
        f"the scale shape support only (1, ) and (1, n), got {tuple(scale.shape)}",
    )
    require(
        round_mode in {0, 1, None}, operator, f"round_mode must be 0 or 1. but now is {round_mode}"
    )
    require_dtype(scale, "scale", (torch.float32,), operator, kernel=SCALES)
    words = _kept_bits(scale_words(scale), rounded=round_mode == 1) | _QUANTISE
    if offset is None:
        return words
    require_dtype(offset, "offset", (torch.float32,), operator, kernel=SCALES)
    _check_offset_shape(operator, scale, offset)
    integers = offset.round().clamp(-256, 255).to(torch.int64)
    return words | ((integers & _OFFSET_MASK) << _OFFSET_SHIFT)


def npu_convert_weight_to_int4pack(weight: torch.Tensor, inner_k_tiles: int = 0) -> torch.Tensor:
    """Pack eight int4 values of the last axis into a word, the first in the lowest four bits.

    On A2 and A3 a weight of three dimensions loses every matrix but the first, as in torch_npu of
    2026: pack one expert after the other. On A5 all stay, and float32 holds float4 values.

    Args:
        weight: contiguous int32 ``[K, N]`` or ``[E, K, N]``, of which the low four bits count.
        inner_k_tiles: without effect.

    Returns:
        int32 ``[K, N/8]``, on A5 ``[E, K, N/8]`` too; stored as the weight is.
    """
    operator = "npu_convert_weight_to_int4pack"
    require(weight.is_contiguous(), operator, "weight should be contiguous")
    require(
        weight.ndim in {2, 3},
        operator,
        f"weight shape only support dim num 2/3, but it is {weight.ndim}",
    )
    require(
        weight.dtype in {torch.int32, torch.float32},
        operator,
        f"weight dtype only support int32 and float32, but it is {weight.dtype}",
    )
    require(
        weight.shape[-1] % VALUES_PER_WORD == 0,
        operator,
        f"weight last dim should be the multiple of 8, but it is {weight.shape[-1]}",
    )
    newest = current_chip().generation is Generation.A5
    if weight.dtype is torch.float32:
        require(newest, operator, "expected scalar type Int but found Float")
        not_emulated(operator, "packing of float4")
    kept = weight if newest or weight.ndim == 2 else weight[0]
    return tag(pack_words(kept), storage_format(weight))


OPERATORS: Final[tuple[tuple[str, Callable[..., object]], ...]] = (
    ("npu_trans_quant_param", npu_trans_quant_param),
    ("npu_convert_weight_to_int4pack", npu_convert_weight_to_int4pack),
)


def _kept_bits(bits: torch.Tensor, *, rounded: bool) -> torch.Tensor:
    """The upper 19 bits of float32 numbers, the others zero."""
    if not rounded:
        return bits & _KEPT
    odd = (bits >> _DROPPED_BITS) & 1
    nearest = (bits + (1 << (_DROPPED_BITS - 1)) - 1 + odd) & _KEPT
    exponent = bits & _EXPONENT
    nearest = torch.where(exponent == _EXPONENT, bits & _KEPT, nearest)
    return torch.where(exponent == 0, bits & _SIGN, nearest)


def _check_offset_shape(operator: str, scale: torch.Tensor, offset: torch.Tensor) -> None:
    if scale.ndim == 2:
        require(
            offset.shape == scale.shape,
            operator,
            "when the input shape of scale is (1, n), shape of scale and offset should be equal",
        )
        return
    require(
        offset.ndim == 1 and (offset.shape == scale.shape or 1 in {len(offset), len(scale)}),
        operator,
        "offset first dim should be equal to scale first dim if none of them are equal to one",
    )
