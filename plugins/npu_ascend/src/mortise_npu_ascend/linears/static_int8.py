"""int8 weights with int8 rows, all of one scale that was fixed beforehand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from mortise_npu_ascend.layout import columns_last, in_tiles, transposed
from mortise_npu_ascend.linears.base import LinearProduct

if TYPE_CHECKING:
    from mortise.plugin import StoredWeight
    from mortise_npu_ascend.vendor import Vendor


@dataclass(frozen=True, slots=True)
class StaticInt8Linear(LinearProduct):
    """W8A8 with a static input.

    Args:
        torch_npu: the operators.
        weight: int8 ``[K, N]``.
        reciprocal: float32 ``[K]``, one over the input's scale, repeated.
        offset: float32 ``[K]``, the input's offset, repeated.
        scale: float32 ``[N]``, the input's scale times the weight's.
        bias: int32 ``[N]``: the bias in units of ``scale``, less the offset's share of the sums.
    """

    torch_npu: Any
    weight: torch.Tensor
    reciprocal: torch.Tensor
    offset: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor

    @classmethod
    def of(
        cls, vendor: Vendor, stored: StoredWeight, bias: torch.Tensor | None
    ) -> StaticInt8Linear:
        """Lay a stored weight ``[N, K]`` of one part out."""
        assert stored.scale is not None
        assert stored.input_scale is not None
        input_scale, input_offset = stored.input_scale.float(), stored.input_offset
        if input_offset is None:
            input_offset = torch.zeros_like(input_scale)
        columns = stored.weight.shape[-1]
        scale_N = input_scale * columns_last(stored.scale)
        return cls(
            torch_npu=vendor.torch_npu,
            weight=in_tiles(vendor.torch_npu, transposed(stored.weight), wanted=vendor.tiles),
            reciprocal=input_scale.reciprocal().expand(columns).contiguous(),
            offset=input_offset.float().expand(columns).contiguous(),
            scale=scale_N,
            bias=integer_bias(stored.weight, input_offset, scale_N, bias),
        )

    def multiply(self, rows_TK: torch.Tensor) -> torch.Tensor:
        """Quantise by the reciprocal, multiply exactly, add the integer bias, scale once."""
        # Of bfloat16 rows the operator would want the reciprocal in bfloat16, off by up to half an
        # integer at the end of the range.
        values_TK = self.torch_npu.npu_quantize(
            rows_TK.float(), self.reciprocal, self.offset, torch.qint8, -1, False
        )
        product: torch.Tensor = self.torch_npu.npu_quant_matmul(
            values_TK, self.weight, self.scale, bias=self.bias, output_dtype=torch.bfloat16
        )
        return product


def integer_bias(
    weight_NK: torch.Tensor,
    input_offset: torch.Tensor,
    scale_N: torch.Tensor,
    bias_N: torch.Tensor | None,
) -> torch.Tensor:
    """Bias over scale less offset times the sum of the weights, rounded; ModelSlim's definition.

    Returns:
        int32 ``[N]``; what exceeds it saturates.
    """
    # On the host: float32 does not hold such sums, and devices have no more.
    sums_N = weight_NK.sum(dim=-1, dtype=torch.int64).cpu()
    integers_N = -input_offset.cpu().double() * sums_N
    if bias_N is not None:
        integers_N = integers_N + bias_N.cpu().double() / scale_N.cpu().double()
    range_ = torch.iinfo(torch.int32)
    clamped_N = integers_N.round().clamp(range_.min, range_.max)
    return clamped_N.to(torch.int32).to(weight_NK.device)
