"""The experts' two products with SwiGLU between them, on rows that were dispatched already."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mortise.plugin import DispatchDtype, check_dispatched_tokens
from mortise_npu_ascend.groups import Groups
from mortise_npu_ascend.products.base import Kind, Rows, quantise
from mortise_npu_ascend.products.int8 import Int8Product
from mortise_npu_ascend.weights import PreparedExperts, prepare_expert_weights

if TYPE_CHECKING:
    import torch

    from mortise.plugin import DispatchedTokens, ExpertWeights
    from mortise_npu_ascend.products.base import Product
    from mortise_npu_ascend.vendor import Vendor


def quantized_moe_apply(
    vendor: Vendor, tokens: DispatchedTokens, experts: ExpertWeights, out_dtype: torch.dtype
) -> torch.Tensor:
    """Run all experts at once, each on its group of rows.

    Rows that arrived as the first product multiplies them are taken as they are, others are
    quantised here. Rows of no group stay undefined.

    Raises:
        ContractError: the rows are not what their format says, or not what the experts take.
    """
    check_dispatched_tokens(tokens, experts)
    if tokens.receive is not None:
        tokens.receive()
    groups = Groups.of(tokens, experts.layer)
    if not tokens.rows.shape[0]:
        return tokens.rows.new_empty((0, experts.hidden_size), dtype=out_dtype)
    prepared = _prepared(vendor, experts)
    arrived = _arrived(vendor, tokens, prepared.w13.takes)
    between = _between(vendor, arrived, prepared.w13, prepared.w2.takes, groups)
    sums_RH = prepared.w2.multiply(between, groups)
    if tokens.row_weights is not None:
        sums_RH = sums_RH.float() * tokens.row_weights.unsqueeze(-1)
    return sums_RH.to(out_dtype)


def _prepared(vendor: Vendor, experts: ExpertWeights) -> PreparedExperts:
    if experts.prepared is None:
        experts = prepare_expert_weights(vendor, experts)
    assert isinstance(experts.prepared, PreparedExperts), "prepared by another backend"
    return experts.prepared


def _arrived(vendor: Vendor, tokens: DispatchedTokens, kind: Kind) -> Rows:
    """The rows as the first product takes them."""
    if tokens.format.dtype is DispatchDtype.INT8:
        assert kind is Kind.INT8, "the check of dispatched tokens lets no such rows through"
        return Rows(tokens.rows, tokens.scales, are_borrowed=True)
    return quantise(vendor.torch_npu, tokens.rows, kind)


def _between(vendor: Vendor, rows: Rows, w13: Product, kind: Kind, groups: Groups) -> Rows:
    """Gate over up, SwiGLU, and the rows of the kind that the second product takes."""
    if isinstance(w13, Int8Product) and w13.fuses_swiglu and kind is Kind.INT8:
        return w13.swiglu(rows, groups)
    # The gate is the first half, which the operator activates.
    activated_RI = vendor.torch_npu.npu_swiglu(w13.multiply(rows, groups), dim=-1)
    return quantise(vendor.torch_npu, activated_RI, kind)
