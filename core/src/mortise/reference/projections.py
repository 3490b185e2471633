"""One quantised projection outside the experts, in plain torch."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from mortise.errors import ContractError
from mortise.reference.products.base import Product
from mortise.reference.products.select import product_of
from mortise.reference.support import COMPUTE_DTYPES
from mortise.spec.reasons import ReasonCode
from mortise.spec.weights import WeightScheme

if TYPE_CHECKING:
    import torch

    from mortise.spec.weights import LinearWeight


def prepare_linear_weight(linear: LinearWeight) -> LinearWeight:
    """Widen the weight once, so that no call unpacks it; a float weight is left as it is.

    Costs four bytes a weight; the stored tensors are kept and are what is prepared again.
    """
    if linear.stored.scheme is WeightScheme.FLOAT:
        return linear
    return replace(linear, prepared=product_of(linear.stored))


def quantized_linear(
    rows: torch.Tensor, linear: LinearWeight, out_dtype: torch.dtype
) -> torch.Tensor:
    """Quantise as the scheme says, multiply, add the bias, round once; prepared or not.

    Raises:
        ContractError: rows are quantised, of another width, or of another dtype than the weight
            where that is unquantised.
    """
    _check_rows(rows, linear)
    product = product_of(linear.stored) if linear.prepared is None else linear.prepared
    assert isinstance(product, Product), "prepared by another backend"
    return product.apply(rows, linear.bias).to(out_dtype)


def _check_rows(rows: torch.Tensor, linear: LinearWeight) -> None:
    stored = linear.stored
    dtypes = (stored.weight.dtype,) if stored.scheme is WeightScheme.FLOAT else COMPUTE_DTYPES
    if rows.dtype not in dtypes:
        raise ContractError(
            f"layer {linear.layer}: {rows.dtype} rows met {stored.scheme.value} weights",
            reason=ReasonCode.CONTRACT_BROKEN,
            expected=f"unquantised rows of {' or '.join(str(dtype) for dtype in dtypes)}",
        )
    if rows.dim() != 2 or rows.shape[1] != linear.in_features:
        raise ContractError(
            f"layer {linear.layer}: rows of shape {tuple(rows.shape)} met a projection of"
            f" {linear.in_features} columns",
            reason=ReasonCode.CONTRACT_BROKEN,
            expected=f"rows [T, {linear.in_features}]",
        )
