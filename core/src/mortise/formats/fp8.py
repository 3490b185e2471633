"""Float8 e4m3 in groups of 128 columns or blocks of 128 x 128, under float32 or ue8m0 scales."""

from __future__ import annotations

from typing import Final, assert_never

import torch

from mortise.errors import QuantizationConfigError
from mortise.spec.weights import ScaleFormat

E4M3_MAX: Final = 448.0
"""Largest finite value of e4m3 (the variant without infinities, float8_e4m3fn)."""

GROUP: Final = 128
"""Columns of a row that share a scale; blocks of a weight are as many rows high."""

SMALLEST_AMAX: Final = 1e-10
"""Groups of zeros, or nearly so, are scaled as if this was their largest magnitude."""

_BYTES_PER_WORD: Final = 4
_MANTISSA_BITS: Final = 23
_MANTISSA: Final = (1 << _MANTISSA_BITS) - 1


def to_e4m3(values: torch.Tensor) -> torch.Tensor:
    """Round float32 or bfloat16 to float8_e4m3fn: to nearest, ties to even, saturating at 448.

    Every NaN becomes the byte 0x7f. Bit for bit the vendor's saturating conversion of float32.
    """
    # Above 464 torch 2.11 converts to NaN where later versions saturate.
    clamped = values.float().clamp(-E4M3_MAX, E4M3_MAX)
    return clamped.masked_fill(clamped.isnan(), torch.nan).to(torch.float8_e4m3fn)


def ceil_to_ue8m0(scale: torch.Tensor) -> torch.Tensor:
    """Round positive float32 up to a power of two, between 2**-126 and 2**127.

    Works on the bits: ``exp2(ceil(log2(scale)))`` errs next to powers of two, and converting to
    ``torch.float8_e8m0fnu`` rounds to the nearest. NaN and infinity become 2**127.
    """
    bits = scale.float().view(torch.int32)
    exponent = _exponent(bits) + ((bits & _MANTISSA) != 0)
    return (exponent.clamp(1, 254) << _MANTISSA_BITS).view(torch.float32)


def pack_ue8m0(scale: torch.Tensor) -> torch.Tensor:
    """Pack the exponents of float32 powers of two ``[..., C]`` into int32 ``[..., ceil(C/4)]``.

    Byte j of the little-endian word i is the biased exponent of column 4i + j; bytes past the last
    column are 0. Only exponents are kept: round with :func:`ceil_to_ue8m0` before quantising.
    """
    exponents = _exponent(scale.view(torch.int32)).to(torch.uint8)
    return _pad(exponents, -1, _BYTES_PER_WORD).view(torch.int32)


def unpack_ue8m0(packed: torch.Tensor, num_columns: int) -> torch.Tensor:
    """Unpack int32 ``[..., ceil(C/4)]`` into float32 ``[..., C]``, C being ``num_columns``."""
    # A copy: a single column may have any stride, is contiguous, and yet cannot be viewed as bytes.
    exponents = packed.clone(memory_format=torch.contiguous_format).view(torch.uint8)
    exponents = exponents[..., :num_columns]
    return (exponents.to(torch.int32) << _MANTISSA_BITS).view(torch.float32)


def quantise_fp8_rows(
    hidden: torch.Tensor, scale_format: ScaleFormat = ScaleFormat.FLOAT32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise every 128 consecutive columns of a row by their largest magnitude.

    In float32: amax is at least 1e-10; scale = amax / 448, rounded up to a power of two where the
    format is UE8M0; values = x * (1 / scale), saturating at 448. A power of two is thus part of
    the quantisation and not put over it. The rule for float32 scales is that of SGLang's
    row-major kernel (``per_token_group_quant_fp8``); other kernels differ in the last bit of a
    scale.

    Args:
        hidden: float32 or bfloat16 ``[..., K]``; the last group may be shorter.
        scale_format: FLOAT32 or UE8M0.

    Returns:
        float8_e4m3fn ``[..., K]`` and float32 scales ``[..., ceil(K/128)]``.

    Raises:
        QuantizationConfigError: ``scale_format`` is E4M3.
    """
    columns = hidden.shape[-1]
    groups = _split(hidden.float(), -1)
    scale = _scale_of(groups.abs().amax(dim=-1), scale_format)
    values = to_e4m3(groups * scale.reciprocal().unsqueeze(-1))
    return values.flatten(-2)[..., :columns].contiguous(), scale


def dequantise_fp8_rows(
    values: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Multiply e4m3 ``[..., K]`` by float32 scales ``[..., ceil(K/128)]``, rounding once."""
    columns = values.shape[-1]
    groups = _split(values.float(), -1) * scale.unsqueeze(-1)
    return groups.flatten(-2)[..., :columns].to(dtype).contiguous()


def quantise_fp8_block(
    weight: torch.Tensor, scale_format: ScaleFormat = ScaleFormat.FLOAT32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise blocks of 128 x 128 by the rule of :func:`quantise_fp8_rows`.

    Args:
        weight: float32 or bfloat16 ``[..., N, K]``; blocks at the edges may be smaller.
        scale_format: FLOAT32 or UE8M0.

    Returns:
        float8_e4m3fn ``[..., N, K]`` and float32 scales ``[..., ceil(N/128), ceil(K/128)]``.

    Raises:
        QuantizationConfigError: ``scale_format`` is E4M3.
    """
    blocks = _split_blocks(weight.float())
    scale = _scale_of(blocks.abs().amax(dim=(-3, -1)), scale_format)
    values = to_e4m3(blocks * scale.reciprocal()[..., :, None, :, None])
    return _join_blocks(values, weight.shape), scale


def dequantise_fp8_block(
    values: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Multiply e4m3 ``[..., N, K]`` by float32 scales ``[..., ceil(N/128), ceil(K/128)]``.

    Rounds once. Checkpoints call these scales ``weight_scale_inv``; they multiply all the same.
    """
    blocks = _split_blocks(values.float()) * scale[..., :, None, :, None]
    return _join_blocks(blocks.to(dtype), values.shape)


def _scale_of(amax: torch.Tensor, scale_format: ScaleFormat) -> torch.Tensor:
    amax = amax.clamp(min=SMALLEST_AMAX)
    # By a tensor: dividing by a Python number may be done as multiplying by its reciprocal.
    scale = amax / amax.new_full((), E4M3_MAX)
    match scale_format:
        case ScaleFormat.FLOAT32:
            return scale
        case ScaleFormat.UE8M0:
            return ceil_to_ue8m0(scale)
        case ScaleFormat.E4M3:
            raise QuantizationConfigError(
                f"float8 values in groups of {GROUP} have no {scale_format} scales",
                expected=f"{ScaleFormat.FLOAT32} or {ScaleFormat.UE8M0}",
                remedy="correct the scale format of the layer's quantisation",
            )
        case _:
            assert_never(scale_format)


def _exponent(bits: torch.Tensor) -> torch.Tensor:
    """Biased exponents of the bits of float32."""
    return (bits >> _MANTISSA_BITS) & 0xFF


def _pad(tensor: torch.Tensor, dim: int, multiple: int) -> torch.Tensor:
    """Append zeros along ``dim`` up to a multiple."""
    missing = -tensor.shape[dim] % multiple
    if not missing:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = missing
    return torch.cat((tensor, tensor.new_zeros(shape)), dim=dim)


def _split(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    """Make two dimensions of ``dim`` (counted from the end): groups, and 128 in each."""
    padded = _pad(tensor, dim, GROUP)
    groups: torch.Tensor = padded.unflatten(dim, (padded.shape[dim] // GROUP, GROUP))
    return groups


def _split_blocks(weight: torch.Tensor) -> torch.Tensor:
    """``[..., N, K]`` to ``[..., N/128, 128, K/128, 128]``, padded with zeros."""
    return _split(_split(weight, -1), -3)


def _join_blocks(blocks: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """The inverse of :func:`_split_blocks`; ``shape`` is ``[..., N, K]``."""
    rows, columns = shape[-2:]
    return blocks.flatten(-4, -3).flatten(-2)[..., :rows, :columns].contiguous()
