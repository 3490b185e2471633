"""NVFP4 weights of all local experts as the programs read them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from mortise.formats.nvfp4 import swizzle_scales

if TYPE_CHECKING:
    from mortise.plugin import StoredWeight


@dataclass(frozen=True, slots=True, kw_only=True)
class Nvfp4Weight:
    """One projection ``[E, N, K]`` of E experts; S parts of N/S rows were projections of their own.

    Args:
        values: uint8 ``[E, N, K/2]``, as stored.
        scales: float8 e4m3 ``[E, S, N', K']``, flat in the last two: the scales of each part in
            tiles of 128 rows by 4 columns, padded with zeros.
        global_scale: float32 ``[E, S]``, the factor of each part.
    """

    values: torch.Tensor
    scales: torch.Tensor
    global_scale: torch.Tensor

    @classmethod
    def of(cls, stored: StoredWeight) -> Nvfp4Weight:
        """Rearrange the scales of a stored weight, with or without the dimension of experts."""
        assert stored.scale is not None and stored.global_scale is not None
        values, scale = _stacked(stored.weight, 3), _stacked(stored.scale, 3)
        parts = scale.unflatten(1, (stored.num_parts, -1))
        return cls(
            values=values.detach().contiguous(),
            # As bytes: the tiles are copied, and not every copy of float8 is there on every device.
            scales=swizzle_scales(parts.view(torch.uint8)).view(torch.float8_e4m3fn),
            global_scale=_stacked(stored.global_scale, 2).float().contiguous(),
        )

    @property
    def num_experts(self) -> int:
        """E."""
        return self.values.shape[0]

    @property
    def num_parts(self) -> int:
        """S."""
        return self.global_scale.shape[1]

    @property
    def rows(self) -> int:
        """N."""
        return self.values.shape[1]

    @property
    def part_rows(self) -> int:
        """N/S."""
        return self.rows // self.num_parts

    @property
    def columns(self) -> int:
        """K."""
        return self.values.shape[2] * 2


def _stacked(tensor: torch.Tensor, dimensions: int) -> torch.Tensor:
    """With a first dimension of experts, of one where it has none."""
    return tensor if tensor.dim() == dimensions else tensor.unsqueeze(0)
