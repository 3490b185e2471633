"""int4 weights that are made bfloat16 before rows meet them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from mortise.formats.integer import unpack_int4
from mortise_npu_ascend.layout import int4_words
from mortise_npu_ascend.linears.base import LinearProduct

if TYPE_CHECKING:
    from mortise.plugin import StoredWeight
    from mortise_npu_ascend.vendor import Vendor


@dataclass(frozen=True, slots=True)
class WeightOnlyLinear(LinearProduct):
    """W4A16.

    Args:
        torch_npu: the operators.
        weight: int32 words along N, ``[K, N/8]``.
        scale: bfloat16 ``[G, N]``.
        group_size: columns that share a scale; 0 is all of them.
        bias: float32 ``[N]``, or None.
    """

    torch_npu: Any
    weight: torch.Tensor
    scale: torch.Tensor
    group_size: int
    bias: torch.Tensor | None

    @classmethod
    def of(
        cls, vendor: Vendor, stored: StoredWeight, bias: torch.Tensor | None
    ) -> WeightOnlyLinear:
        """Lay a stored weight ``[N, K/8]`` out."""
        assert stored.scale is not None
        num_groups = stored.scale.shape[-1]
        columns = 8 * stored.weight.shape[-1]
        return cls(
            torch_npu=vendor.torch_npu,
            weight=int4_words(vendor.torch_npu, unpack_int4(stored.weight), tiles=False),
            # The operator takes scales of the rows' dtype alone.
            scale=stored.scale.to(torch.bfloat16).T.contiguous(),
            group_size=columns // num_groups if num_groups > 1 else 0,
            bias=bias,
        )

    def multiply(self, rows_TK: torch.Tensor) -> torch.Tensor:
        """Round values times scales to bfloat16, accumulate in float32, round once."""
        product: torch.Tensor = self.torch_npu.npu_weight_quant_batchmatmul(
            rows_TK,
            self.weight,
            self.scale,
            bias=self.bias,
            antiquant_group_size=self.group_size,
        )
        return product
