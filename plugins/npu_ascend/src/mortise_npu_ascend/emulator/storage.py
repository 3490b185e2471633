"""How a tensor lies in the device's memory: a tag on its storage, the numbers stay in order."""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import torch


class Format(IntEnum):
    """Storage formats that MoE layers use, by torch_npu's numbers."""

    ND = 2
    """Row after row."""
    FRACTAL_NZ = 29
    """Tiles, as the matrix units read them."""


_TAG: Final = "mortise_npu_ascend_format"


def storage_format(tensor: torch.Tensor) -> Format:
    """How a tensor is stored; all views of a storage have its format, a copy is ``ND`` again."""
    found: Format = getattr(tensor.untyped_storage(), _TAG, Format.ND)
    return found


def stored_as(tensor: torch.Tensor, storage: Format) -> torch.Tensor:
    """A copy of a tensor whose storage has a format."""
    return tag(tensor.detach().clone(), storage)


def tag(tensor: torch.Tensor, storage: Format) -> torch.Tensor:
    """Say of a tensor that nobody else has how it is stored, and return it."""
    setattr(tensor.untyped_storage(), _TAG, storage)
    return tensor
