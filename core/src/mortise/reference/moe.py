"""The experts' two products with SwiGLU between them, one expert after the other."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias, cast

import torch
import torch.nn.functional as F

from mortise.reference.products.base import Product, QuantisedRows
from mortise.reference.products.select import product_of
from mortise.reference.products.unquantised import UnquantisedProduct
from mortise.spec.consumer import PLAIN, check_dispatched_tokens
from mortise.spec.dispatch import DispatchDecision, DispatchedTokens, GroupListKind, RowLayout
from mortise.spec.weights import StoredWeight, WeightScheme

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mortise.spec.experts import ExpertWeights

Place: TypeAlias = "slice | tuple[int, slice]"
"""Where the rows of one expert are: the index of rows, scales, weights and results alike."""

ProductOfExpert: TypeAlias = "Callable[[int], Product]"


@dataclass(frozen=True, slots=True)
class PreparedExperts:
    """The products of each local expert; None where a projection is unquantised."""

    w13: tuple[Product, ...] | None
    w2: tuple[Product, ...] | None


def prepare_expert_weights(experts: ExpertWeights, decision: DispatchDecision) -> ExpertWeights:
    """Widen quantised weights once, so that no call unpacks them; float weights stay as they are.

    Costs four bytes a weight; the stored tensors are kept and are what is prepared again.
    """
    prepared = PreparedExperts(_prepare(experts.w13), _prepare(experts.w2))
    if prepared == PreparedExperts(None, None):
        return experts
    return replace(experts, prepared=prepared)


def quantized_moe_apply(
    tokens: DispatchedTokens, experts: ExpertWeights, out_dtype: torch.dtype
) -> torch.Tensor:
    """Run each expert on its group of rows; rows of no group are not read and stay undefined.

    Raises:
        ContractError: the rows are not what their format says, or not what the experts take.
    """
    check_dispatched_tokens(tokens, experts)
    if tokens.receive is not None:
        tokens.receive()
    w13, w2 = _products(experts)
    middle_dtype = _middle_dtype(experts, out_dtype)
    shape = (*tokens.rows.shape[:-1], experts.hidden_size)
    output = tokens.rows.new_empty(shape, dtype=out_dtype)
    for expert, place in _groups(tokens):
        # Silu and the product round as torch rounds them in this dtype, as in unquantised models.
        gate_RI, up_RI = _first_sums(tokens, place, w13(expert)).to(middle_dtype).chunk(2, dim=-1)
        sums_RH = w2(expert).apply(F.silu(gate_RI) * up_RI)
        if tokens.row_weights is not None:
            sums_RH = sums_RH.float() * tokens.row_weights[place].unsqueeze(-1)
        output[place] = sums_RH  # the one rounding
    return output


def _groups(tokens: DispatchedTokens) -> Iterator[tuple[int, Place]]:
    """Each expert that has rows, and where they are."""
    masked = tokens.format.row_layout is RowLayout.MASKED
    aligned = tokens.format.row_layout is RowLayout.GROUPED_ALIGNED
    start = 0
    for expert, count in enumerate(_counts(tokens)):
        if count:
            yield expert, (expert, slice(count)) if masked else slice(start, start + count)
        start += count + (-count % tokens.format.alignment if aligned else 0)


def _counts(tokens: DispatchedTokens) -> tuple[int, ...]:
    if tokens.group_counts is not None:
        return tokens.group_counts
    group_list = cast("list[int]", tokens.group_list.tolist())
    if tokens.group_list_kind is GroupListKind.COUNTS:
        return tuple(group_list)
    return tuple(end - start for start, end in zip([0, *group_list], group_list, strict=False))


def _first_sums(tokens: DispatchedTokens, place: Place, w13: Product) -> torch.Tensor:
    rows = tokens.rows[place]
    if tokens.format.dtype in PLAIN:
        return w13.apply(rows)
    assert tokens.scales is not None
    return w13.apply_quantised(
        QuantisedRows(rows, tokens.scales[place], tokens.format.global_scale)
    )


def _middle_dtype(experts: ExpertWeights, out_dtype: torch.dtype) -> torch.dtype:
    """The dtype between the products: that of unquantised weights where there are any."""
    for stored in (experts.w2, experts.w13):
        if stored.scheme is WeightScheme.FLOAT:
            return stored.weight.dtype
    return out_dtype


def _products(experts: ExpertWeights) -> tuple[ProductOfExpert, ProductOfExpert]:
    prepared = experts.prepared or PreparedExperts(None, None)
    assert isinstance(prepared, PreparedExperts), "prepared by another backend"
    return _product(experts.w13, prepared.w13), _product(experts.w2, prepared.w2)


def _product(stored: StoredWeight, prepared: tuple[Product, ...] | None) -> ProductOfExpert:
    if prepared is not None:
        return prepared.__getitem__
    if stored.scheme is WeightScheme.FLOAT:
        return lambda expert: UnquantisedProduct(stored.weight[expert])
    return lambda expert: product_of(_of_expert(stored, expert))


def _prepare(stored: StoredWeight) -> tuple[Product, ...] | None:
    if stored.scheme is WeightScheme.FLOAT:
        return None
    return tuple(product_of(_of_expert(stored, expert)) for expert in range(len(stored.weight)))


def _of_expert(stored: StoredWeight, expert: int) -> StoredWeight:
    """One expert's share of stacked tensors; views."""
    return StoredWeight(
        scheme=stored.scheme,
        weight=stored.weight[expert],
        scale=_at(stored.scale, expert),
        global_scale=_at(stored.global_scale, expert),
        input_scale=_at(stored.input_scale, expert),
        input_offset=_at(stored.input_offset, expert),
        num_parts=stored.num_parts,
        scale_format=stored.scale_format,
    )


def _at(tensor: torch.Tensor | None, expert: int) -> torch.Tensor | None:
    return None if tensor is None else tensor[expert]
