"""int4 weights that are made bfloat16 before rows meet them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch

from mortise.formats.integer import unpack_int4
from mortise_npu_ascend.dispatch import Generation
from mortise_npu_ascend.layout import columns_last, int4_words
from mortise_npu_ascend.products.base import Kind, Product, Rows, grouped_matmul

if TYPE_CHECKING:
    from mortise.plugin import StoredWeight
    from mortise_npu_ascend.groups import Groups
    from mortise_npu_ascend.vendor import Vendor

A5_GROUPS: Final = (256, 128, 64, 32)
"""Columns that may share a scale on the A5, largest first; A2 and A3 take any divisor of K."""


def operator_group(generation: Generation, group_size: int) -> int:
    """The largest group that the operator takes and a stored group is a multiple of; 0 if none."""
    if generation is not Generation.A5:
        return group_size
    return next((size for size in A5_GROUPS if group_size % size == 0), 0)


@dataclass(frozen=True, slots=True)
class WeightOnlyProduct(Product):
    """W4A16.

    Args:
        torch_npu: the operators.
        weight: int32 words along N, ``[E_l, K, N/8]``.
        scale: bfloat16 ``[E_l, N]`` per channel, else ``[E_l, G, N]``.
    """

    torch_npu: Any
    weight: torch.Tensor
    scale: torch.Tensor

    @classmethod
    def of(cls, vendor: Vendor, stored: StoredWeight) -> WeightOnlyProduct:
        """Lay a stored weight ``[E_l, N, K/8]`` out."""
        assert stored.scale is not None
        scale_EGN = columns_last(stored.scale)
        num_groups = stored.scale.shape[-1]
        if num_groups > 1:
            group_size = 8 * stored.weight.shape[-1] // num_groups
            times = group_size // operator_group(vendor.generation, group_size)
            scale_EGN = scale_EGN.repeat_interleave(times, dim=-2)
        return cls(
            torch_npu=vendor.torch_npu,
            weight=int4_words(vendor.torch_npu, unpack_int4(stored.weight), tiles=False),
            # The operator takes scales of the rows' dtype alone.
            scale=scale_EGN.to(torch.bfloat16),
        )

    @property
    def takes(self) -> Kind:
        """bfloat16 rows."""
        return Kind.PLAIN

    def multiply(self, rows: Rows, groups: Groups) -> torch.Tensor:
        """Round values times scales to bfloat16, accumulate in float32, round once."""
        return grouped_matmul(
            self.torch_npu,
            rows.values,
            self.weight,
            groups,
            torch.bfloat16,
            antiquant_scale=self.scale,
        )
