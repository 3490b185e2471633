"""NVFP4: float4 e2m1 in blocks of 16 columns, an e4m3 scale a block, and one global scale."""

from __future__ import annotations

from typing import Final

import torch

from mortise.errors import QuantizationConfigError
from mortise.formats.fp8 import E4M3_MAX, to_e4m3

BLOCK: Final = 16
"""Columns that share a scale."""

E2M1_MAX: Final = 6.0
"""Largest value of e2m1."""

_MAGNITUDES: Final = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_SIGN: Final = 8
# Half-way between neighbours, and whether the half-way value itself rounds up: to the even code.
_MIDPOINTS: Final = (
    (0.25, False),
    (0.75, True),
    (1.25, False),
    (1.75, True),
    (2.5, False),
    (3.5, True),
    (5.0, False),
)
_LARGEST: Final = torch.finfo(torch.float32).max
_SMALLEST_NORMAL: Final = torch.finfo(torch.float32).tiny


def to_e2m1(values: torch.Tensor) -> torch.Tensor:
    """Round float32 or bfloat16 to e2m1 codes, uint8 0..15, one to a byte.

    To nearest, ties to the even code, saturating at 6; bit 3 is the sign, also of zero. NaN becomes
    +6, as there is no NaN in e2m1. Bit for bit the vendor's conversion of float32.
    """
    values = values.float()
    magnitudes = values.abs()
    codes = torch.zeros_like(values, dtype=torch.uint8)
    for midpoint, ties_up in _MIDPOINTS:
        codes += magnitudes >= midpoint if ties_up else magnitudes > midpoint
    codes |= values.signbit().to(torch.uint8) * _SIGN
    return codes.masked_fill_(values.isnan(), len(_MAGNITUDES) - 1)


def from_e2m1(codes: torch.Tensor) -> torch.Tensor:
    """float32 values of e2m1 codes 0..15."""
    signed = (*_MAGNITUDES, *(-magnitude for magnitude in _MAGNITUDES))
    table = torch.tensor(signed, dtype=torch.float32, device=codes.device)
    return table[codes.to(torch.int32)]


def pack_e2m1(codes: torch.Tensor) -> torch.Tensor:
    """Pack codes ``[..., K]`` into uint8 ``[..., K/2]``, the even column in the low nibble.

    Raises:
        QuantizationConfigError: K is odd.
    """
    _require_multiple(codes.shape[-1], 2)
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack_e2m1(packed: torch.Tensor) -> torch.Tensor:
    """Unpack uint8 ``[..., K/2]`` into codes ``[..., K]``: the inverse of :func:`pack_e2m1`."""
    return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)


def global_scale_of(amax: torch.Tensor) -> torch.Tensor:
    """float32 factor ``amax / 2688`` of a tensor whose largest magnitude is ``amax``.

    2688 is the largest value (6) times the largest block scale (448). The factor is 1 where
    ``amax`` is not finite, is zero, or so small that the factor would be no normal float32.
    """
    amax = amax.float()
    # By a tensor: dividing by a Python number may be done as multiplying by its reciprocal.
    scale = amax / amax.new_full((), E2M1_MAX * E4M3_MAX)
    usable = scale.isfinite() & (scale >= _SMALLEST_NORMAL)
    return scale.masked_fill(~usable, 1.0)


def multiplier_from_divisor(divisor: torch.Tensor) -> torch.Tensor:
    """The global scale that multiplies, of one that divides, and the other way round.

    compressed-tensors stores the divisor ``2688 / amax`` (``weight_global_scale``), modelopt the
    factor ``amax / 2688`` (``weight_scale_2``); everywhere here it is the factor.
    """
    return divisor.float().reciprocal()


def quantise_nvfp4(
    hidden: torch.Tensor, global_scale: torch.Tensor | float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise blocks of 16 columns under a known global scale.

    Same as :func:`quantise_nvfp4_by_divisor` with the float32 reciprocal of ``global_scale``: the
    kernels that quantise on a device take the divisor.

    Args:
        hidden: float32 or bfloat16 ``[..., K]``.
        global_scale: the factor ``amax / 2688``; a tensor must broadcast to ``[..., 1]``.

    Returns:
        uint8 ``[..., K/2]`` and float8_e4m3fn scales ``[..., K/16]``.

    Raises:
        QuantizationConfigError: K is no multiple of 16.
    """
    scale = torch.as_tensor(global_scale, dtype=torch.float32, device=hidden.device)
    return quantise_nvfp4_by_divisor(hidden, scale.reciprocal())


def quantise_nvfp4_by_divisor(
    hidden: torch.Tensor, divisor: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise blocks of 16 columns, given the reciprocal of the global scale.

    In float32, with d the divisor and a the largest magnitude of the block::

        scale  = e4m3(d * (a * (1/6)))        saturating at 448
        factor = 1 / (scale * (1/d))          0 where scale is 0, at most the largest float32
        code   = e2m1(x * factor)

    So 1/6 is a rounded constant, 1/d a rounded reciprocal (not the global scale that d may have
    been made of), and x is multiplied, not divided: the order of operations of TensorRT-LLM's
    ``cvt_warp_fp16_to_fp4``, with exact reciprocals where that takes approximate ones.

    Args:
        hidden: float32 or bfloat16 ``[..., K]``.
        divisor: float32, ``2688 / amax``; broadcasts to ``[..., 1]``.

    Returns:
        uint8 ``[..., K/2]`` and float8_e4m3fn scales ``[..., K/16]``.

    Raises:
        QuantizationConfigError: K is no multiple of 16.
    """
    blocks = _split(hidden.float())
    scale = to_e4m3(divisor * (blocks.abs().amax(dim=-1) * (1 / E2M1_MAX)))
    scale_f32 = scale.float()
    factor = (scale_f32 * divisor.reciprocal()).reciprocal().clamp(max=_LARGEST)
    factor = factor.masked_fill(scale_f32 == 0, 0.0)
    codes = to_e2m1(blocks * factor.unsqueeze(-1))
    return pack_e2m1(codes.flatten(-2)), scale


def dequantise_nvfp4(
    packed: torch.Tensor,
    scale: torch.Tensor,
    global_scale: torch.Tensor | float,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Multiply values by the scale of their block and by the global scale.

    ``(value * scale) * global_scale`` in float32: the first product is exact, the second rounds.

    Args:
        packed: uint8 ``[..., K/2]``.
        scale: float8_e4m3fn ``[..., K/16]``.
        global_scale: the factor ``amax / 2688``; a tensor must broadcast to ``[..., 1]``.
        dtype: of the result ``[..., K]``.
    """
    blocks = _split(from_e2m1(unpack_e2m1(packed)))
    values = (blocks * scale.float().unsqueeze(-1)).flatten(-2)
    return (values * global_scale).to(dtype)


def swizzle_scales(scale: torch.Tensor) -> torch.Tensor:
    """Arrange block scales ``[..., M, C]`` in tiles of 128 rows by 4 columns, flat.

    Rows are padded to a multiple of 128 and columns to one of 4, with zeros. The scale of row m and
    column c of the padded ``[M', C']`` stands at
    ``((m // 128 * C'/4 + c // 4) * 32 + m % 32) * 16 + m % 128 // 32 * 4 + c % 4``: the order that
    torch calls ``SWIZZLE_32_4_4``.

    Returns:
        ``[..., M' * C']``, same dtype.
    """
    *leading, rows, columns = scale.shape
    padded = scale.new_zeros((*leading, _round_up(rows, 128), _round_up(columns, 4)))
    padded[..., :rows, :columns] = scale
    tiles: torch.Tensor = padded.unflatten(-1, (-1, 4)).unflatten(-3, (-1, 4, 32))
    return tiles.transpose(-4, -2).flatten(-5)


def unswizzle_scales(flat: torch.Tensor, num_rows: int, num_columns: int) -> torch.Tensor:
    """Take the scales ``[..., M, C]`` out of what :func:`swizzle_scales` made of them."""
    row_tiles, column_tiles = _round_up(num_rows, 128) // 128, _round_up(num_columns, 4) // 4
    tiles: torch.Tensor = flat.unflatten(-1, (row_tiles, column_tiles, 32, 4, 4))
    padded = tiles.transpose(-4, -2).flatten(-5, -3).flatten(-2)
    return padded[..., :num_rows, :num_columns].contiguous()


def _split(tensor: torch.Tensor) -> torch.Tensor:
    """``[..., K]`` to ``[..., K/16, 16]``."""
    columns = tensor.shape[-1]
    _require_multiple(columns, BLOCK)
    blocks: torch.Tensor = tensor.unflatten(-1, (columns // BLOCK, BLOCK))
    return blocks


def _require_multiple(columns: int, multiple: int) -> None:
    if columns % multiple:
        raise QuantizationConfigError(
            f"{columns} columns cannot be stored as NVFP4: {columns} is no multiple of {multiple}",
            expected=f"a multiple of {multiple}",
            remedy="leave this projection unquantised, or use another scheme for it",
        )


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
