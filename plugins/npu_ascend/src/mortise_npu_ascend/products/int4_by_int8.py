"""int4 weights with int8 rows on A2 and A3, which multiply the halves of a row one by one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch

from mortise_npu_ascend.groups import ListType
from mortise_npu_ascend.layout import int4_values, int4_words, pad_groups, padded_group, scale_words
from mortise_npu_ascend.products.base import Kind, Product, Rows, grouped_matmul
from mortise_npu_ascend.products.fp16_range import shrinking

if TYPE_CHECKING:
    from mortise.plugin import StoredWeight
    from mortise_npu_ascend.groups import Groups
    from mortise_npu_ascend.vendor import Vendor

GROUP: Final = 256
"""Columns that share a scale: the only size that the operator takes, and a divisor of K."""

_HALF_OF_ROW: Final = 8
"""Largest magnitude of a half: int4."""


@dataclass(frozen=True, slots=True)
class Int4ByInt8Product(Product):
    """W4A8 on A2 and A3.

    Args:
        torch_npu: the operators.
        weight: int32 words along N, ``[E_l, K', N/8]``; K' is K with every group padded.
        scale: int64, the bits of float32: ``[E_l, 1, N]`` per channel, else ``[E_l, K'/256, N]``.
        assist_bias: float32 ``[E_l, N]``, 8 times the sum of each output row. The operator lowers
            the lower half of an int8 value by 8 to fit int4; this gives it back.
        num_groups: G of the stored weight.
        group_size: columns of a padded group.
        row_factor: of the rows' scales, a power of two that undoes the shrinking of the others.
    """

    torch_npu: Any
    weight: torch.Tensor
    scale: torch.Tensor
    assist_bias: torch.Tensor
    num_groups: int
    group_size: int
    row_factor: float

    @classmethod
    def of(cls, vendor: Vendor, stored: StoredWeight) -> Int4ByInt8Product:
        """Lay a stored weight ``[E_l, N, K/8]`` out; the bias is computed, never read."""
        assert stored.scale is not None
        num_groups = stored.scale.shape[-1]
        group_size = padded_group(8 * stored.weight.shape[-1], num_groups, GROUP)
        values_ENK = int4_values(stored.weight, num_groups, group_size)
        exponent = shrinking(values_ENK, stored.scale, _HALF_OF_ROW)
        scale_ENG = stored.scale.float() * 2.0**-exponent
        return cls(
            torch_npu=vendor.torch_npu,
            # The operator reads counts alone, and of tiles no list of counts of length one.
            weight=int4_words(
                vendor.torch_npu, values_ENK, tiles=vendor.tiles and len(values_ENK) > 1
            ),
            scale=scale_words(_scale_of_operator(scale_ENG, group_size)),
            assist_bias=assist_bias(values_ENK, scale_ENG),
            num_groups=num_groups,
            group_size=group_size,
            row_factor=2.0**exponent,
        )

    @property
    def takes(self) -> Kind:
        """int8 rows."""
        return Kind.INT8

    def multiply(self, rows: Rows, groups: Groups) -> torch.Tensor:
        """Sum groups of 256 columns in fp16, then scale in float32 and round to bfloat16."""
        assert rows.scales is not None
        return grouped_matmul(
            self.torch_npu,
            self._own_values(rows),
            self.weight,
            groups,
            torch.bfloat16,
            list_type=ListType.COUNTS,
            scale=self.scale,
            per_token_scale=rows.scales * self.row_factor if self.row_factor > 1 else rows.scales,
            bias=self.assist_bias,
        )

    def _own_values(self, rows: Rows) -> torch.Tensor:
        """Padded rows, in memory that the operator may overwrite, as its kernel does."""
        padded_RK = pad_groups(rows.values, self.num_groups, self.group_size)
        return padded_RK.clone() if rows.are_borrowed and padded_RK is rows.values else padded_RK


def assist_bias(values_ENK: torch.Tensor, scale_ENG: torch.Tensor) -> torch.Tensor:
    """8 times the sum over the columns of values times scales, float32 ``[E_l, N]``."""
    groups = values_ENK.unflatten(-1, (scale_ENG.shape[-1], -1))
    sums_ENG = groups.sum(dim=-1, dtype=torch.int64)
    bias_EN: torch.Tensor = 8 * (sums_ENG.float() * scale_ENG).sum(dim=-1)
    return bias_EN


def _scale_of_operator(scale_ENG: torch.Tensor, group_size: int) -> torch.Tensor:
    scale_EGN = scale_ENG.transpose(-1, -2)
    if scale_EGN.shape[-2] == 1:
        return scale_EGN
    return scale_EGN.repeat_interleave(group_size // GROUP, dim=-2)
