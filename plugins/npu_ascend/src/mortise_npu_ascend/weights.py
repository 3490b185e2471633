"""The weights of a layer's experts, laid out for the device."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from mortise.plugin import BackendUnusableError, ReasonCode
from mortise_npu_ascend.limits import WORD, Projection, grouped_problem
from mortise_npu_ascend.products.select import grouped_product

if TYPE_CHECKING:
    from mortise.plugin import ExpertWeights, StoredWeight
    from mortise_npu_ascend.products.base import Product
    from mortise_npu_ascend.vendor import Vendor


@dataclass(frozen=True, slots=True)
class PreparedExperts:
    """The two products of a layer."""

    w13: Product
    w2: Product


def prepare_expert_weights(vendor: Vendor, experts: ExpertWeights) -> ExpertWeights:
    """Lay both projections out, from the stored tensors, which are kept for the next time.

    Raises:
        BackendUnusableError: a stored tensor is something that the device does not take.
    """
    prepared = PreparedExperts(
        w13=_product(vendor, experts.w13, f"layer {experts.layer}: w13"),
        w2=_product(vendor, experts.w2, f"layer {experts.layer}: w2"),
    )
    return replace(experts, prepared=prepared)


def _product(vendor: Vendor, stored: StoredWeight, name: str) -> Product:
    problem = grouped_problem(projection_of(stored), vendor.generation)
    if problem:
        raise BackendUnusableError(
            f"{name}: {problem}",
            reason=ReasonCode.REQUEST_UNSUPPORTED,
            remedy="use a checkpoint that the device serves, or backend reference",
        )
    return grouped_product(vendor, stored)


def projection_of(stored: StoredWeight) -> Projection:
    """What the limits look at, of stored tensors."""
    values_per_element = WORD if stored.weight.dtype is torch.int32 else 1
    return Projection(
        scheme=stored.scheme,
        out_features=stored.weight.shape[-2],
        in_features=stored.weight.shape[-1] * values_per_element,
        num_groups=1 if stored.scale is None else stored.scale.shape[-1],
        num_parts=stored.num_parts,
        static_input=stored.input_scale is not None,
    )
