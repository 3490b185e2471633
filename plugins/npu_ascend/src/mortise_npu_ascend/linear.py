"""Quantised projections outside the experts: laid out once, then multiplied."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from mortise.plugin import BackendUnusableError, ContractError, ReasonCode, WeightScheme
from mortise_npu_ascend.capabilities import QUANTISED_DTYPES
from mortise_npu_ascend.limits import linear_problem
from mortise_npu_ascend.linears.pieces import pieces
from mortise_npu_ascend.linears.select import linear_product
from mortise_npu_ascend.weights import projection_of

if TYPE_CHECKING:
    from mortise.plugin import LinearWeight
    from mortise_npu_ascend.linears.base import LinearProduct
    from mortise_npu_ascend.vendor import Vendor


@dataclass(frozen=True, slots=True)
class PreparedLinear:
    """The products of a projection's pieces, in the order of their rows."""

    products: tuple[LinearProduct, ...]


def prepare_linear_weight(vendor: Vendor, linear: LinearWeight) -> LinearWeight:
    """Lay a projection out, from the stored tensors, which are kept for the next time.

    Raises:
        BackendUnusableError: a stored tensor is something that the device does not take.
    """
    if linear.stored.scheme is WeightScheme.FLOAT:
        return linear
    problem = linear_problem(projection_of(linear.stored), vendor.generation)
    if problem:
        raise BackendUnusableError(
            f"layer {linear.layer}: {problem}",
            reason=ReasonCode.REQUEST_UNSUPPORTED,
            remedy="use a checkpoint that the device serves, or backend reference",
        )
    products = [linear_product(vendor, piece) for piece in pieces(linear.stored, linear.bias)]
    return replace(linear, prepared=PreparedLinear(tuple(products)))


def quantized_linear(
    vendor: Vendor, rows_TK: torch.Tensor, linear: LinearWeight, out_dtype: torch.dtype
) -> torch.Tensor:
    """Quantise as the scheme says, multiply, add the bias; prepared or not.

    Raises:
        ContractError: rows are quantised, of another width, or of a dtype that the weight does not
            take.
    """
    _check_rows(rows_TK, linear)
    if linear.stored.scheme is WeightScheme.FLOAT:
        return F.linear(rows_TK, linear.stored.weight, linear.bias).to(out_dtype)
    if not rows_TK.shape[0]:
        # The operators take no empty tensors.
        return rows_TK.new_empty((0, linear.out_features), dtype=out_dtype)
    if linear.prepared is None:
        linear = prepare_linear_weight(vendor, linear)
    assert isinstance(linear.prepared, PreparedLinear), "prepared by another backend"
    rows_TK = rows_TK.contiguous()
    results = [product.multiply(rows_TK) for product in linear.prepared.products]
    return (results[0] if len(results) == 1 else torch.cat(results, dim=1)).to(out_dtype)


def _check_rows(rows_TK: torch.Tensor, linear: LinearWeight) -> None:
    stored = linear.stored
    is_float = stored.scheme is WeightScheme.FLOAT
    dtypes = (stored.weight.dtype,) if is_float else QUANTISED_DTYPES
    if rows_TK.dtype not in dtypes:
        raise ContractError(
            f"layer {linear.layer}: {rows_TK.dtype} rows met {stored.scheme.value} weights",
            reason=ReasonCode.CONTRACT_BROKEN,
            expected=f"unquantised rows of {' or '.join(map(str, dtypes))}",
        )
    if rows_TK.dim() != 2 or rows_TK.shape[1] != linear.in_features:
        raise ContractError(
            f"layer {linear.layer}: rows of shape {tuple(rows_TK.shape)} met a projection of"
            f" {linear.in_features} columns",
            reason=ReasonCode.CONTRACT_BROKEN,
            expected=f"rows [T, {linear.in_features}]",
        )
