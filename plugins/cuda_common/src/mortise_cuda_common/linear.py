"""Quantised projections outside the experts: laid out once, then multiplied as a single expert."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from mortise.plugin import ContractError, ReasonCode, WeightScheme
from mortise_cuda_common.experts import named_product
from mortise_cuda_common.groups import Groups
from mortise_cuda_common.limits import QUANTISED_DTYPE

if TYPE_CHECKING:
    from mortise.plugin import LinearWeight
    from mortise_cuda_common.products.base import Product
    from mortise_cuda_common.products.select import Products


@dataclass(frozen=True, slots=True)
class PreparedLinear:
    """The product of a projection."""

    product: Product


def prepare_linear_weight(products: Products, linear: LinearWeight) -> LinearWeight:
    """Lay a projection out, from the stored tensors, which are kept for the next time.

    Raises:
        BackendUnusableError: nothing multiplies by a stored tensor, or not what was asked for.
    """
    if linear.stored.scheme is WeightScheme.FLOAT:
        return linear
    product = named_product(products, linear.stored, f"layer {linear.layer}")
    return replace(linear, prepared=PreparedLinear(product))


def quantized_linear(
    products: Products, rows_TK: torch.Tensor, linear: LinearWeight, out_dtype: torch.dtype
) -> torch.Tensor:
    """Quantise as the scheme says, multiply, add the bias, round; prepared or not.

    The bias is added in float32, to the float32 sums where they can be had, else to the bfloat16
    ones that DeepGEMM gives.

    Raises:
        ContractError: rows are quantised, of another width, or of a dtype that the weight does not
            take.
    """
    _check_rows(rows_TK, linear)
    if linear.stored.scheme is WeightScheme.FLOAT:
        return F.linear(rows_TK, linear.stored.weight, linear.bias).to(out_dtype)
    if not rows_TK.shape[0]:
        return rows_TK.new_empty((0, linear.out_features), dtype=out_dtype)
    if linear.prepared is None:
        linear = prepare_linear_weight(products, linear)
    assert isinstance(linear.prepared, PreparedLinear), "prepared by another backend"
    product = linear.prepared.product
    groups = Groups.single(rows_TK.shape[0], rows_TK.device)
    rows = product.quantise(rows_TK.contiguous(), groups)
    if linear.bias is None:
        return product.multiply(rows, groups, out_dtype)
    sums_TN = product.multiply(rows, groups, torch.float32)
    return (sums_TN + linear.bias).to(out_dtype)


def _check_rows(rows_TK: torch.Tensor, linear: LinearWeight) -> None:
    stored = linear.stored
    is_float = stored.scheme is WeightScheme.FLOAT
    dtype = stored.weight.dtype if is_float else QUANTISED_DTYPE
    if rows_TK.dtype is not dtype:
        raise ContractError(
            f"layer {linear.layer}: {rows_TK.dtype} rows met {stored.scheme.value} weights",
            reason=ReasonCode.CONTRACT_BROKEN,
            expected=f"unquantised rows of {dtype}",
        )
    if rows_TK.dim() != 2 or rows_TK.shape[1] != linear.in_features:
        raise ContractError(
            f"layer {linear.layer}: rows of shape {tuple(rows_TK.shape)} met a projection of"
            f" {linear.in_features} columns",
            reason=ReasonCode.CONTRACT_BROKEN,
            expected=f"rows [T, {linear.in_features}]",
        )
