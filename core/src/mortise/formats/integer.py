"""Symmetric int8 and int4: quantised rows and weights, and eight int4 values to a word."""

# N output rows and K columns of a weight, H columns of a row, G groups of columns of one output
# row. All arithmetic is float32, whatever the dtype of the input.

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

import torch

from mortise.errors import QuantizationConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

Bits: TypeAlias = Literal[4, 8]

LARGEST: Final[Mapping[Bits, int]] = MappingProxyType({4: 7, 8: 127})
"""Largest value that a quantiser writes: the ranges are symmetric, -8 and -128 stay unused."""

VALUES_PER_WORD: Final = 8
"""int4 values in an int32 word."""

_SMALLEST_NORMAL: Final = torch.finfo(torch.float32).tiny
# 0x88888888 as a signed word: the sign bit of each of eight nibbles.
_NIBBLE_SIGNS: Final = 0x88888888 - (1 << 32)


def quantise_int_rows(hidden: torch.Tensor, bits: Bits) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise each row by its own largest magnitude, as the experts' input is.

    scale = amax / 127 (int4: / 7) and value = rint(x * (127 / amax)), ties to even: the definition
    that dynamic per-token quantisers of accelerators follow. A row of zeros, or one so small that
    its scale would not be a normal float32 (below 2**-126), becomes zeros with scale 0. A row that
    holds NaN or infinity gets zeros and a scale that is NaN or infinite, so that it dequantises
    to NaN.

    Args:
        hidden: float32 or bfloat16 ``[..., H]``.
        bits: 8 or 4; int4 values come one to a byte, see :func:`pack_int4`.

    Returns:
        int8 ``[..., H]`` in -127..127 (-7..7), and float32 scales ``[...]``.
    """
    rows = hidden.float()
    amax = rows.abs().amax(dim=-1, keepdim=True)
    # A tensor, because dividing a number by a tensor, or on some devices a tensor by a number,
    # multiplies by a reciprocal, which rounds twice.
    largest = torch.full_like(amax, LARGEST[bits])
    scale = amax / largest
    nothing = scale < _SMALLEST_NORMAL
    scale = scale.masked_fill(nothing, 0.0)
    factor = (largest / amax).masked_fill(nothing, 0.0)
    return _round(rows * factor, bits), scale.squeeze(-1)


def quantise_int_weight(
    weight: torch.Tensor, bits: Bits, group_size: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise each output row, or each group of its columns, by its largest magnitude.

    scale = amax / 127 (int4: / 7) and value = rint(w / scale), ties to even: dividing by the
    stored scale, as ``compressed_tensors.quantization.quantize`` does. A group of zeros (or with
    a scale that is no normal float32) becomes zeros with scale 1, so that stored scales are
    positive.

    Args:
        weight: float32 or bfloat16 ``[..., N, K]``.
        bits: 8 or 4; int4 values come one to a byte, see :func:`pack_int4`.
        group_size: columns that share a scale, a divisor of K; None is all of them (per channel).

    Returns:
        int8 ``[..., N, K]`` in -127..127 (-7..7), and float32 scales ``[..., N, G]``.

    Raises:
        QuantizationConfigError: ``group_size`` does not divide K.
    """
    columns = weight.shape[-1]
    group_size = columns if group_size is None else group_size
    require_divisible(columns, group_size, "groups of columns")
    groups = weight.float().unflatten(-1, (columns // group_size, group_size))
    amax = groups.abs().amax(dim=-1, keepdim=True)
    scale = amax / torch.full_like(amax, LARGEST[bits])
    scale = scale.masked_fill(scale < _SMALLEST_NORMAL, 1.0)
    return _round(groups / scale, bits).flatten(-2), scale.squeeze(-1)


def dequantise_int(
    values: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Multiply int8 ``[..., N, K]`` by the scale ``[..., N, G]`` of its group of K / G columns.

    The product is taken in float32 and then rounded to ``dtype``.

    Raises:
        QuantizationConfigError: the G groups do not divide the K columns.
    """
    columns, num_groups = values.shape[-1], scale.shape[-1]
    require_divisible(columns, num_groups, "groups of columns")
    groups: torch.Tensor = values.float().unflatten(-1, (num_groups, columns // num_groups))
    return groups.mul(scale.float().unsqueeze(-1)).flatten(-2).to(dtype)


def quantise_static_int8(
    hidden: torch.Tensor, input_scale: torch.Tensor, input_offset: torch.Tensor
) -> torch.Tensor:
    """Quantise ``[..., H]`` by a scale and an offset fixed beforehand.

    value = clamp(rint(x / input_scale + input_offset), -128, 127), ties to even; scale and offset
    are float32 and broadcast against the input. Static W8A8 of ModelSlim.
    """
    scaled = hidden.float() / input_scale + input_offset
    return scaled.round().clamp(-128, 127).to(torch.int8)


def pack_int4(values: torch.Tensor) -> torch.Tensor:
    """Pack int8 ``[..., K]`` in -8..7 into int32 ``[..., K/8]``.

    Two's complement, the first of eight columns in the lowest nibble; bits above the fourth are
    dropped.

    Raises:
        QuantizationConfigError: K is no multiple of 8.
    """
    require_divisible(values.shape[-1], VALUES_PER_WORD, "int32 words of eight int4 values")
    return pack_int4_bytes(values, -1).view(torch.int32)


def unpack_int4(packed: torch.Tensor) -> torch.Tensor:
    """Unpack int32 ``[..., K/8]`` into int8 ``[..., K]``: the inverse of :func:`pack_int4`."""
    return unpack_int4_bytes(packed.contiguous().view(torch.int8), -1)


def from_offset_binary(packed: torch.Tensor) -> torch.Tensor:
    """Make two's complement of int32 words whose nibbles hold value + 8.

    compressed-tensors stores int4 so (``compressors/pack_quantized/helpers.py``).
    """
    return packed.bitwise_xor(_NIBBLE_SIGNS)


def to_offset_binary(packed: torch.Tensor) -> torch.Tensor:
    """Make words whose nibbles hold value + 8 of two's complement: the same exchange of signs."""
    return packed.bitwise_xor(_NIBBLE_SIGNS)


def pack_int4_bytes(values: torch.Tensor, dim: int) -> torch.Tensor:
    """Pack pairs along ``dim`` of int8 in -8..7 into int8 bytes, the first in the low nibble.

    Raises:
        QuantizationConfigError: that dimension is odd.
    """
    dim = dim % values.ndim
    size = values.shape[dim]
    require_divisible(size, 2, "bytes of two int4 values")
    low, high = values.unflatten(dim, (size // 2, 2)).unbind(dim + 1)
    return torch.bitwise_or(high << 4, low & 0xF).contiguous()


def unpack_int4_bytes(packed: torch.Tensor, dim: int) -> torch.Tensor:
    """Unpack int8 or uint8 bytes into int8 in -8..7, doubling ``dim``, the low nibble first.

    ModelSlim's W4A8 packs two output rows to a byte (``dim=-2``).
    """
    dim = dim % packed.ndim
    bytes_ = packed.view(torch.int8)
    nibbles = torch.stack((bytes_ & 0xF, (bytes_ >> 4) & 0xF), dim=dim + 1)
    # Four bits of two's complement, widened: 0..7 stay, 8..15 become -8..-1.
    return ((nibbles ^ 8) - 8).flatten(dim, dim + 1)


def require_divisible(size: int, divisor: int, units: str) -> None:
    """Raise where ``size`` rows or columns cannot be cut into ``units`` of ``divisor`` each.

    Raises:
        QuantizationConfigError: with both numbers.
    """
    if divisor < 1 or size % divisor:
        raise QuantizationConfigError(
            f"a dimension of {size} cannot be divided into {units}: {size} is no multiple of "
            f"{divisor}",
            expected=f"a multiple of {divisor}",
            remedy="use a scheme or a group size that fits the tensor, or leave it unquantised",
        )


def _round(scaled: torch.Tensor, bits: Bits) -> torch.Tensor:
    """Round ties to even and clamp: a quotient of amax may end just above the largest value."""
    # Converting NaN to an integer is undefined, and its scale says NaN already.
    largest = LARGEST[bits]
    return scaled.round().clamp(-largest, largest).nan_to_num(0.0).to(torch.int8)
