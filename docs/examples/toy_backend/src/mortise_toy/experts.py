"""One layer's experts: their weights in blocks, and each expert on its own group of rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch
import torch.nn.functional as F

from mortise.plugin import GroupListKind, RowLayout, check_dispatched_tokens
from mortise_toy.product import blocks_of, compensated_product

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mortise.plugin import DispatchedTokens, ExpertWeights

Place: TypeAlias = "slice | tuple[int, slice]"
"""Where the rows of one expert are: an index of rows, weights and results alike."""


@dataclass(frozen=True, slots=True)
class BlockedExperts:
    """Float32 blocks of columns: ``[E_l, 2*I, C]`` of w13, ``[E_l, H, C]`` of w2."""

    w13: tuple[torch.Tensor, ...]
    w2: tuple[torch.Tensor, ...]


def block_weights(experts: ExpertWeights, columns: int) -> BlockedExperts:
    """Lay out both projections; the stored tensors are read, and kept as they are."""
    return BlockedExperts(
        blocks_of(experts.w13.weight, columns), blocks_of(experts.w2.weight, columns)
    )


def run_experts(
    tokens: DispatchedTokens, experts: ExpertWeights, out_dtype: torch.dtype
) -> torch.Tensor:
    """Gate and up, SwiGLU, down, in the layout of ``tokens.rows``; rows of no group stay undefined.

    Raises:
        ContractError: the rows are not what their format says, or not what the experts take.
    """
    check_dispatched_tokens(tokens, experts)
    if tokens.receive is not None:
        tokens.receive()
    blocks = experts.prepared
    assert isinstance(blocks, BlockedExperts), "the core hands back what was prepared here"
    shape = (*tokens.rows.shape[:-1], experts.hidden_size)
    output = tokens.rows.new_empty(shape, dtype=out_dtype)
    for expert, place in _groups(tokens):
        rows_RH = tokens.rows[place]
        sums = compensated_product(rows_RH, _of(blocks.w13, expert))
        # As in the reference: what is between the products has the dtype of unquantised weights.
        gate_RI, up_RI = sums.to(experts.w2.weight.dtype).chunk(2, dim=-1)
        results_RH = compensated_product(F.silu(gate_RI) * up_RI, _of(blocks.w2, expert))
        if tokens.row_weights is not None:
            results_RH = results_RH * tokens.row_weights[place].unsqueeze(-1)
        output[place] = results_RH  # rounds to its dtype
    return output


def _of(blocks: Sequence[torch.Tensor], expert: int) -> list[torch.Tensor]:
    return [block[expert] for block in blocks]


def _groups(tokens: DispatchedTokens) -> Iterator[tuple[int, Place]]:
    """Each expert that has rows, and where they are."""
    layout = tokens.format.row_layout
    alignment = tokens.format.alignment if layout is RowLayout.GROUPED_ALIGNED else 1
    start = 0
    for expert, count in enumerate(_counts(tokens)):
        if count and layout is RowLayout.MASKED:
            yield expert, (expert, slice(count))
        elif count:
            yield expert, slice(start, start + count)
        start += -(-count // alignment) * alignment


def _counts(tokens: DispatchedTokens) -> Sequence[int]:
    if tokens.group_counts is not None:
        return tokens.group_counts
    group_list = tokens.group_list
    if tokens.group_list_kind is GroupListKind.CUMULATIVE:
        group_list = group_list.diff(prepend=group_list.new_zeros(1))
    return [int(count) for count in group_list.tolist()]
