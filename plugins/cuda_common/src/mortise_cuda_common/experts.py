"""The weights of a layer's experts, laid out for the chip."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mortise.plugin import BackendUnusableError

if TYPE_CHECKING:
    from mortise.plugin import ExpertWeights, StoredWeight
    from mortise_cuda_common.products.base import Product
    from mortise_cuda_common.products.select import Products


@dataclass(frozen=True, slots=True)
class PreparedExperts:
    """The two products of a layer."""

    w13: Product
    w2: Product


def prepare_expert_weights(products: Products, experts: ExpertWeights) -> ExpertWeights:
    """Lay both projections out, from the stored tensors, which are kept for the next time.

    Where the chip multiplies by what is stored the products refer to it and hold nothing twice.

    Args:
        products: of the model role.
        experts: of one layer.

    Raises:
        BackendUnusableError: nothing multiplies by a stored tensor, or not what was asked for.
    """
    prepared = PreparedExperts(
        w13=named_product(products, experts.w13, f"layer {experts.layer}: w13"),
        w2=named_product(products, experts.w2, f"layer {experts.layer}: w2"),
    )
    return replace(experts, prepared=prepared)


def named_product(products: Products, stored: StoredWeight, name: str) -> Product:
    """The product of a stored weight.

    Args:
        products: of the model role.
        stored: the weight.
        name: what to call it where it has none.

    Raises:
        BackendUnusableError: it has none.
    """
    try:
        return products.of(stored)
    except BackendUnusableError as error:
        raise BackendUnusableError(
            f"{name}: {error.what}", reason=error.reason, remedy=error.remedy
        ) from error
