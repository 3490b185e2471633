"""The experts' two products with SwiGLU between them, on rows that were dispatched already."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from mortise.formats.fp8 import GROUP, unpack_ue8m0
from mortise.plugin import (
    ContractError,
    DispatchDtype,
    ReasonCode,
    ScaleFormat,
    WeightScheme,
    check_dispatched_tokens,
)
from mortise_cuda_common.arrangement import arrangement
from mortise_cuda_common.experts import PreparedExperts, prepare_expert_weights
from mortise_cuda_common.groups import Groups
from mortise_cuda_common.kernels.swiglu import swiglu
from mortise_cuda_common.limits import QUANTISED_DTYPE
from mortise_cuda_common.rows import Kind, Rows

if TYPE_CHECKING:
    from mortise.plugin import DispatchedTokens, ExpertWeights
    from mortise_cuda_common.products.base import Product
    from mortise_cuda_common.products.select import Products


def quantized_moe_apply(
    products: Products, tokens: DispatchedTokens, experts: ExpertWeights, out_dtype: torch.dtype
) -> torch.Tensor:
    """Run all experts at once, each on its group of rows; the host does not wait for the device.

    Rows that arrived as the first product multiplies them are taken as they are, others are
    quantised here. Rows of no group stay undefined.

    Args:
        products: of the model role.
        tokens: the rows, in any layout.
        experts: of one layer, prepared or not.
        out_dtype: of the result.

    Returns:
        ``[R, H]``, or ``[E_l, capacity, H]`` of masked rows.

    Raises:
        ContractError: the rows are not what their format says, or not what the experts take.
    """
    check_dispatched_tokens(tokens, experts)
    _check_dtype(tokens, experts)
    if tokens.receive is not None:
        tokens.receive()
    groups = Groups.of(tokens)
    shape = (*tokens.rows.shape[:-1], experts.hidden_size)
    if not groups.num_rows:
        return tokens.rows.new_empty(shape, dtype=out_dtype)
    prepared = _prepared(products, experts)
    w13, w2 = prepared.w13.for_rows(groups), prepared.w2.for_rows(groups)
    rows = _arrived(tokens, w13, groups)
    if tokens.row_weights is None:
        return _moved(products, rows, groups, (w13, w2), _plain_dtype(experts), out_dtype).view(
            shape
        )
    sums_RH = _moved(products, rows, groups, (w13, w2), _plain_dtype(experts), torch.float32)
    return (sums_RH.view(shape) * tokens.row_weights.unsqueeze(-1)).to(out_dtype)


def _check_dtype(tokens: DispatchedTokens, experts: ExpertWeights) -> None:
    scheme, dtype = experts.w13.scheme, tokens.format.dtype
    if scheme is not WeightScheme.FLOAT and dtype is DispatchDtype.FP32:
        raise ContractError(
            f"layer {experts.layer}: {dtype.value} rows met {scheme.value} weights",
            reason=ReasonCode.CONTRACT_BROKEN,
            expected=f"unquantised rows of {QUANTISED_DTYPE}",
        )


def _prepared(products: Products, experts: ExpertWeights) -> PreparedExperts:
    if experts.prepared is None:
        experts = prepare_expert_weights(products, experts)
    assert isinstance(experts.prepared, PreparedExperts), "prepared by another backend"
    return experts.prepared


def _arrived(tokens: DispatchedTokens, w13: Product, groups: Groups) -> Rows:
    """The rows, flat, as the first product takes them."""
    stated, values = tokens.format, tokens.rows.flatten(0, -2)
    if tokens.scales is None:
        return w13.quantise(values, groups)
    scales = tokens.scales.flatten(0, -2)
    if stated.dtype is DispatchDtype.NVFP4:
        return Rows(values=values, kind=Kind.NVFP4, scales=scales, global_scale=stated.global_scale)
    assert stated.dtype is DispatchDtype.FP8_E4M3, "the check lets no other scaled rows through"
    if stated.scale_format is ScaleFormat.UE8M0:
        scales = unpack_ue8m0(scales, -(-values.shape[1] // GROUP))
        return Rows(values=values, kind=Kind.FP8_UE8M0, scales=scales)
    return Rows(values=values, kind=Kind.FP8, scales=scales)


def _moved(
    products: Products,
    rows: Rows,
    groups: Groups,
    both: tuple[Product, Product],
    plain_dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Multiply the rows where the products want them to be, and take the results back."""
    multiple = math.lcm(*(product.row_multiple(groups) for product in both))
    move = arrangement(groups, multiple)
    if move is None:
        return _multiplied(products, rows, groups, both, plain_dtype, out_dtype)
    moved = move.apply(rows)
    return move.undo(_multiplied(products, moved, move.groups, both, plain_dtype, out_dtype))


def _multiplied(
    products: Products,
    rows: Rows,
    groups: Groups,
    both: tuple[Product, Product],
    plain_dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    w13, w2 = both
    between = w13.fused_gate_up(rows, groups, w2)
    if between is None:
        gate_up_R2I = w13.multiply(rows, groups, plain_dtype)
        between = w2.quantise(swiglu(products.runtime.programs, gate_up_R2I, groups), groups)
    return w2.multiply(between, groups, out_dtype)


def _plain_dtype(experts: ExpertWeights) -> torch.dtype:
    """The dtype of unquantised rows between the products: that of unquantised weights, if any."""
    for stored in (experts.w2, experts.w13):
        if stored.scheme is WeightScheme.FLOAT:
            return stored.weight.dtype
    return QUANTISED_DTYPE
