"""Every operator that is emulated, with the function that computes it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from mortise_npu_ascend.emulator import (
    dequant_swiglu_quant,
    gating,
    indexer,
    packing,
    permutation,
    quantise,
    quantise_by_scale,
    routing,
    routing_v2,
    swiglu,
    swiglu_quant,
)

if TYPE_CHECKING:
    from collections.abc import Callable

OPERATORS: Final[tuple[tuple[str, Callable[..., object]], ...]] = (
    *quantise.OPERATORS,
    *quantise_by_scale.OPERATORS,
    *packing.OPERATORS,
    *swiglu.OPERATORS,
    *dequant_swiglu_quant.OPERATORS,
    *swiglu_quant.OPERATORS,
    *routing.OPERATORS,
    *routing_v2.OPERATORS,
    *permutation.OPERATORS,
    *gating.OPERATORS,
    *indexer.OPERATORS,
)
"""Pairs of a name in ``schemas.py`` and the function; each module of operators has such a tuple."""
