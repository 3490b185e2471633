"""int8 weights with int8 rows: exact sums, scaled once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch

from mortise_npu_ascend.dispatch import Generation
from mortise_npu_ascend.layout import columns_last, in_tiles, transposed
from mortise_npu_ascend.products.base import Kind, Product, Rows, grouped_matmul

if TYPE_CHECKING:
    from mortise.plugin import StoredWeight
    from mortise_npu_ascend.groups import Groups
    from mortise_npu_ascend.vendor import Vendor

SWIGLU_MULTIPLE: Final = 64
"""Of N, where A2 and A3 apply SwiGLU to groups of int32 sums."""


@dataclass(frozen=True, slots=True)
class Int8Product(Product):
    """W8A8, rows quantised one by one.

    Args:
        torch_npu: the operators.
        weight: int8 ``[E_l, K, N]``.
        scale: float32 ``[E_l, N]``, as stored.
        product_scale: what the product takes of it. A2 and A3 give bfloat16 only for bfloat16
            scales, which are off by up to 2**-8; the A5 takes the stored ones.
        fuses_swiglu: whether N is such that :meth:`swiglu` can be called.
    """

    torch_npu: Any
    weight: torch.Tensor
    scale: torch.Tensor
    product_scale: torch.Tensor
    fuses_swiglu: bool

    @classmethod
    def of(cls, vendor: Vendor, stored: StoredWeight) -> Int8Product:
        """Lay a stored weight ``[E_l, N, K]`` out."""
        assert stored.scale is not None
        scale_EN = columns_last(stored.scale)
        is_a5 = vendor.generation is Generation.A5
        return cls(
            torch_npu=vendor.torch_npu,
            weight=in_tiles(vendor.torch_npu, transposed(stored.weight), wanted=vendor.tiles),
            scale=scale_EN,
            product_scale=scale_EN if is_a5 else scale_EN.to(torch.bfloat16),
            fuses_swiglu=is_a5 or scale_EN.shape[-1] % SWIGLU_MULTIPLE == 0,
        )

    @property
    def takes(self) -> Kind:
        """int8 rows."""
        return Kind.INT8

    def multiply(self, rows: Rows, groups: Groups) -> torch.Tensor:
        """Multiply exact int32 sums by both scales in float32, and round once to bfloat16."""
        return grouped_matmul(
            self.torch_npu,
            rows.values,
            self.weight,
            groups,
            torch.bfloat16,
            scale=self.product_scale,
            per_token_scale=rows.scales,
        )

    def swiglu(self, rows: Rows, groups: Groups) -> Rows:
        """Multiply by gate over up, apply SwiGLU, and quantise the result to int8.

        The int32 sums are scaled by the stored float32 scales, and nothing is rounded before int8.

        Returns:
            int8 ``[R, N/2]`` with scales; rows past the last group are undefined.
        """
        sums_RN = grouped_matmul(self.torch_npu, rows.values, self.weight, groups, torch.int32)
        return Rows(
            *self.torch_npu.npu_dequant_swiglu_quant(
                sums_RN,
                weight_scale=self.scale,
                activation_scale=rows.scales,
                group_index=groups.counts,
                # The gate is the first half; without this it would be the second.
                activate_left=True,
                quant_mode=1,
            )
        )
