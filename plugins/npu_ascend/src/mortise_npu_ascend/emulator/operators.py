"""Every operator that is emulated, with the function that computes it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from mortise_npu_ascend.emulator import gating, indexer, permutation, routing, routing_v2

if TYPE_CHECKING:
    from collections.abc import Callable

OPERATORS: Final[tuple[tuple[str, Callable[..., object]], ...]] = (
    *routing.OPERATORS,
    *routing_v2.OPERATORS,
    *permutation.OPERATORS,
    *gating.OPERATORS,
    *indexer.OPERATORS,
)
"""Pairs of a name in ``schemas.py`` and the function; each module of operators has such a tuple."""
