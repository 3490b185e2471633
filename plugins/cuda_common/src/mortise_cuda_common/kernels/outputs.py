"""Memory for the results of programs, and what is in it before they write."""

from __future__ import annotations

import torch

from mortise.formats.fp8 import GROUP

_POISON = 0xFF
_SCALES_MULTIPLE = 4


def undefined(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Contiguous memory that holds anything; on a CPU, thus of an emulated chip, no number."""
    tensor = torch.empty(shape, dtype=dtype, device=device)
    if device.type == "cpu":
        tensor.view(torch.uint8).fill_(_POISON)
    return tensor


def undefined_scales(num_rows: int, columns: int, device: torch.device) -> torch.Tensor:
    """float32 ``[R, ceil(K/128)]``, K being ``columns``: one column of scales after the other.

    Columns begin at multiples of 16 bytes, as TMA wants them; DeepGEMM then need not transpose.
    """
    padded = -(-num_rows // _SCALES_MULTIPLE) * _SCALES_MULTIPLE
    return undefined((-(-columns // GROUP), padded), torch.float32, device).T[:num_rows]
