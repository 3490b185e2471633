"""What memory a tensor of a number format takes."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch


class TensorLayout(NamedTuple):
    """Shape and dtype of a tensor that is still to be allocated, or to be checked."""

    shape: tuple[int, ...]
    dtype: torch.dtype
