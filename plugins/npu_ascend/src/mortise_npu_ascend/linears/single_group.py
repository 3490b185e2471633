"""A projection as the only expert of a grouped product: for weights no other operator takes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mortise_npu_ascend.groups import Groups
from mortise_npu_ascend.linears.base import LinearProduct
from mortise_npu_ascend.products.base import quantise
from mortise_npu_ascend.products.select import grouped_product

if TYPE_CHECKING:
    import torch

    from mortise.plugin import StoredWeight
    from mortise_npu_ascend.products.base import Product
    from mortise_npu_ascend.vendor import Vendor


@dataclass(frozen=True, slots=True)
class SingleGroupLinear(LinearProduct):
    """W4A8, and W4A4 with groups of columns.

    Args:
        torch_npu: the operators.
        product: of one expert.
        bias: float32 ``[N]``, or None.
    """

    torch_npu: Any
    product: Product
    bias: torch.Tensor | None

    @classmethod
    def of(
        cls, vendor: Vendor, stored: StoredWeight, bias: torch.Tensor | None
    ) -> SingleGroupLinear:
        """Lay a stored weight ``[N, K/8]`` out."""
        assert stored.scale is not None
        one = replace(stored, weight=stored.weight.unsqueeze(0), scale=stored.scale.unsqueeze(0))
        return cls(vendor.torch_npu, grouped_product(vendor, one), bias)

    def multiply(self, rows_TK: torch.Tensor) -> torch.Tensor:
        """Quantise and multiply as for experts, which rounds; add the bias in float32."""
        rows = quantise(self.torch_npu, rows_TK, self.product.takes)
        product = self.product.multiply(rows, Groups.single(rows_TK))
        return product if self.bias is None else product + self.bias
