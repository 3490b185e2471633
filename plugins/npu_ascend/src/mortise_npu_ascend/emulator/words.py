"""Numbers that travel inside integer words: eight int4 values, and scales as float32 bits."""

# Written apart from mortise.formats on purpose: the emulator judges what the plugin packs.

from __future__ import annotations

from typing import Final

import torch

VALUES_PER_WORD: Final = 8

_WORD_SPAN: Final = 1 << 32
_SIGN_BIT: Final = 1 << 31


def pack_words(values: torch.Tensor) -> torch.Tensor:
    """Put eight integers in -8..7 of the last axis into an int32 word.

    Two's complement, the lowest index in the lowest four bits; higher bits of a value are lost.

    Args:
        values: an integer tensor ``[..., N]``, N a multiple of 8.

    Returns:
        int32 ``[..., N/8]``.
    """
    nibbles = values.to(torch.int64).bitwise_and(0xF).unflatten(-1, (-1, VALUES_PER_WORD))
    words = (nibbles << _shifts()).sum(dim=-1)
    return torch.where(words >= _SIGN_BIT, words - _WORD_SPAN, words).to(torch.int32)


def unpack_words(words: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """Take the eight int4 values out of each int32 word: the inverse of :func:`pack_words`.

    Args:
        words: int32; a transposed view is fine.
        dim: the axis along which values were packed.

    Returns:
        int8 in -8..7, eight times as long along ``dim``.
    """
    along = words.movedim(dim, -1).to(torch.int64)
    nibbles = (along.unsqueeze(-1) >> _shifts()).bitwise_and(0xF)
    values = torch.where(nibbles >= 8, nibbles - 16, nibbles).to(torch.int8)
    return values.flatten(-2).movedim(-1, dim)


def scale_words(scale: torch.Tensor) -> torch.Tensor:
    """The bits of float32 scales, widened with zeros to int64: scales of int4 weights."""
    return scale.float().contiguous().view(torch.int32).to(torch.int64) & (_WORD_SPAN - 1)


def scale_of_words(words: torch.Tensor) -> torch.Tensor:
    """The float32 number in the low 32 bits of int64 or uint64 words."""
    if words.dtype == torch.uint64:
        words = words.contiguous().view(torch.int64)
    low = words & (_WORD_SPAN - 1)
    signed = torch.where(low >= _SIGN_BIT, low - _WORD_SPAN, low).to(torch.int32)
    return signed.view(torch.float32)


def _shifts() -> torch.Tensor:
    return torch.arange(0, 4 * VALUES_PER_WORD, 4)
