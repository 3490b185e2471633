"""int4 weights with int8 rows on the A5, which makes the weights int8 first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
import torch.nn.functional as F

from mortise_npu_ascend.layout import int4_values, int4_words, pad_groups, padded_group
from mortise_npu_ascend.products.base import Kind, Product, Rows, grouped_matmul

if TYPE_CHECKING:
    from mortise.plugin import StoredWeight
    from mortise_npu_ascend.groups import Groups
    from mortise_npu_ascend.vendor import Vendor

GROUP: Final = 128
"""Columns that share a scale: the smallest of the sizes that the operator takes."""

MULTIPLE: Final = 64
"""Of the output rows: others are padded with rows of zeros, whose results are cut off."""

LARGEST_FACTOR: Final = 127 / 8
"""Of a group: it makes int8 of all int4 values, and fp16 holds it."""


@dataclass(frozen=True, slots=True)
class Int4MadeInt8Product(Product):
    """W4A8 on the A5.

    Args:
        torch_npu: the operators.
        weight: int32 words along N' in tiles, ``[E_l, K', N'/8]``; K' is K with every group padded,
            N' is N padded.
        group_factor: fp16 ``[E_l, K'/128, N']``; int4 values times it are rounded to int8.
        scale: float32 ``[E_l, N']``, of those.
        num_groups: G of the stored weight.
        group_size: columns of a padded group.
        num_rows: N.
    """

    torch_npu: Any
    weight: torch.Tensor
    group_factor: torch.Tensor
    scale: torch.Tensor
    num_groups: int
    group_size: int
    num_rows: int

    @classmethod
    def of(cls, vendor: Vendor, stored: StoredWeight) -> Int4MadeInt8Product:
        """Lay a stored weight ``[E_l, N, K/8]`` out."""
        assert stored.scale is not None
        num_groups = stored.scale.shape[-1]
        group_size = padded_group(8 * stored.weight.shape[-1], num_groups, GROUP)
        num_rows = stored.weight.shape[-2]
        below = (0, 0, 0, -num_rows % MULTIPLE)
        values_ENK = F.pad(int4_values(stored.weight, num_groups, group_size), below)
        factor_ENG, scale_EN = split_scale(F.pad(stored.scale.float(), below, value=1.0))
        factor_EGN = factor_ENG.transpose(-1, -2).repeat_interleave(group_size // GROUP, dim=-2)
        return cls(
            torch_npu=vendor.torch_npu,
            weight=int4_words(vendor.torch_npu, values_ENK, tiles=True),
            group_factor=factor_EGN.contiguous(),
            scale=scale_EN,
            num_groups=num_groups,
            group_size=group_size,
            num_rows=num_rows,
        )

    @property
    def takes(self) -> Kind:
        """int8 rows."""
        return Kind.INT8

    def multiply(self, rows: Rows, groups: Groups) -> torch.Tensor:
        """Make the weights int8, then sum exactly, scale in float32 and round to bfloat16."""
        padded_RN = grouped_matmul(
            self.torch_npu,
            pad_groups(rows.values, self.num_groups, self.group_size),
            self.weight,
            groups,
            torch.bfloat16,
            antiquant_scale=self.group_factor,
            scale=self.scale,
            per_token_scale=rows.scales,
        )
        return padded_RN[:, : self.num_rows]


def split_scale(scale_ENG: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Split each group's scale into an fp16 factor and a float32 scale of the output row.

    A single group has the factor 1, so its weights stay what they are. Of several the one with the
    largest scale has the largest factor that int8 can hold, which leaves the others the most steps.

    Returns:
        fp16 factors ``[E_l, N, G]`` and float32 scales ``[E_l, N]``.
    """
    if scale_ENG.shape[-1] == 1:
        return torch.ones_like(scale_ENG, dtype=torch.float16), scale_ENG.squeeze(-1).clone()
    unit_EN1 = scale_ENG.amax(dim=-1, keepdim=True) / LARGEST_FACTOR
    return (scale_ENG / unit_EN1).to(torch.float16), unit_EN1.squeeze(-1)
