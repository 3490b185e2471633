"""Every operator that is emulated, with the function that computes it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from mortise_npu_ascend.emulator import (
    dequant_swiglu_quant,
    fused_finalize,
    fused_swiglu,
    gating,
    grouped_matmul,
    grouped_matmul_list,
    indexer,
    packing,
    permutation,
    quant_matmul,
    quantise,
    quantise_by_scale,
    routing,
    routing_v2,
    swiglu,
    swiglu_quant,
    weight_only_matmul,
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
    *grouped_matmul.OPERATORS,
    *grouped_matmul_list.OPERATORS,
    *fused_swiglu.OPERATORS,
    *fused_finalize.OPERATORS,
    *quant_matmul.OPERATORS,
    *weight_only_matmul.OPERATORS,
    *routing.OPERATORS,
    *routing_v2.OPERATORS,
    *permutation.OPERATORS,
    *gating.OPERATORS,
    *indexer.OPERATORS,
)
"""Pairs of a name in ``schemas.py`` and the function; each module of operators has such a tuple."""
