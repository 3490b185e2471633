"""One quantised projection outside the experts, in plain torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from mortise.errors import ContractError
from mortise.spec.reasons import ReasonCode
from mortise.spec.weights import WeightScheme

if TYPE_CHECKING:
    from mortise.spec.weights import LinearWeight


def prepare_linear_weight(linear: LinearWeight) -> LinearWeight:
    """Leave the stored layout: the reference computes on it as it is."""
    return linear


def quantized_linear(
    rows: torch.Tensor, linear: LinearWeight, out_dtype: torch.dtype
) -> torch.Tensor:
    """Multiply in the rows' dtype, round once, add the bias."""
    stored = linear.stored
    if stored.scheme is not WeightScheme.FLOAT or stored.weight.dtype is not rows.dtype:
        raise ContractError(
            f"layer {linear.layer}: {rows.dtype} rows met {stored.scheme.value} weights in "
            f"{stored.weight.dtype}",
            reason=ReasonCode.REQUEST_UNSUPPORTED,
            expected="unquantised weights of the rows' dtype",
        )
    return F.linear(rows, stored.weight, linear.bias).to(out_dtype)
