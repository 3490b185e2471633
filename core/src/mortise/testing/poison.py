"""Poison in rows that nothing defines: whoever reads one of them shows it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

import torch

from mortise.spec.dispatch import GroupListKind, RowLayout

if TYPE_CHECKING:
    from collections.abc import Callable

    from mortise.spec.dispatch import DispatchedTokens
    from mortise.spec.experts import ExpertWeights

POISON: Final = 0xFF
"""Bytes of ones: NaN in every float format, in e4m3 scales and in powers of two as well."""


def with_poison(
    apply: Callable[[DispatchedTokens, ExpertWeights, torch.dtype], torch.Tensor],
) -> Callable[[DispatchedTokens, ExpertWeights, torch.dtype], torch.Tensor]:
    """``quantized_moe_apply`` that meets poison in undefined rows, and leaves poison there.

    Bind it in place of the hook (``dataclasses.replace(ops, quantized_moe_apply=...)``): an expert
    that reads an undefined row, or a combine that reads an undefined result, then gives NaN.
    """

    def poisoned(
        tokens: DispatchedTokens, experts: ExpertWeights, out_dtype: torch.dtype
    ) -> torch.Tensor:
        if tokens.receive is not None:
            tokens.receive()
        results = apply(poison_undefined_rows(tokens), experts, out_dtype)
        return _poison(results, defined_rows(tokens))

    return poisoned


def poison_undefined_rows(tokens: DispatchedTokens) -> DispatchedTokens:
    """Copies of rows, scales and routing weights with poison wherever no group has a row."""
    defined = defined_rows(tokens)
    return replace(
        tokens,
        rows=_poison(tokens.rows, defined),
        scales=None if tokens.scales is None else _poison(tokens.scales, defined),
        row_weights=None if tokens.row_weights is None else _poison(tokens.row_weights, defined),
        receive=None,
    )


def defined_rows(tokens: DispatchedTokens) -> torch.Tensor:
    """Bool ``[R]``, or ``[E_l, capacity]`` of masked rows: whether a row belongs to a group."""
    counts = tokens.group_list
    if tokens.group_list_kind is GroupListKind.CUMULATIVE:
        counts = counts.diff(prepend=counts.new_zeros(1))
    if tokens.format.row_layout is RowLayout.MASKED:
        places = torch.arange(tokens.rows.shape[1], device=counts.device)
        return places < counts.unsqueeze(1)
    aligned = tokens.format.row_layout is RowLayout.GROUPED_ALIGNED
    alignment = tokens.format.alignment if aligned else 1
    defined = torch.zeros(tokens.rows.shape[0], dtype=torch.bool, device=counts.device)
    start = 0
    for count in counts.tolist():
        defined[start : start + count] = True
        start += -(-count // alignment) * alignment
    return defined


def _poison(tensor: torch.Tensor, defined: torch.Tensor) -> torch.Tensor:
    # A byte dimension at the end: a tensor of one number a row has none to be widened.
    copy = tensor.clone(memory_format=torch.contiguous_format)
    copy.unsqueeze(-1).view(torch.uint8)[~defined] = POISON
    return copy
