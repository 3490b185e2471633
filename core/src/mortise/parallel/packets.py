"""Everything that travels for one row, side by side in one run of bytes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mortise.formats.layout import TensorLayout


def pack(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Put tensors of S rows each, ``[S, ...]``, side by side as bytes, ``[S, B]``."""
    return torch.cat([_bytes_of(part) for part in parts], dim=1)


def unpack(packets: torch.Tensor, layouts: Sequence[TensorLayout]) -> list[torch.Tensor]:
    """Undo :func:`pack`: ``[S, B]`` to tensors ``[S, ...]`` of the rows' shapes and dtypes."""
    sizes = [math.prod(layout.shape) * layout.dtype.itemsize for layout in layouts]
    return [
        # A copy, since a dtype of several bytes needs an address that is a multiple of them.
        part.clone(memory_format=torch.contiguous_format)
        .view(layout.dtype)
        .view(packets.shape[0], *layout.shape)
        for part, layout in zip(packets.split(sizes, dim=1), layouts, strict=True)
    ]


def _bytes_of(part: torch.Tensor) -> torch.Tensor:
    flat = part.unsqueeze(1) if part.dim() == 1 else part.flatten(1)
    flat = flat.contiguous()
    if flat.stride(-1) != 1:
        # One column counts as contiguous with any stride, but not where it is seen as bytes.
        flat = flat.clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8)
