"""Grouped-query attention over a paged cache, for one forward pass of a batch of requests."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from mortise.kv.pages import PAGE_SIZE
from mortise.spec.roles import ForwardMode

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mortise.kv.key_values import KeyValuePool
    from mortise.layers.grouped_attention import GroupedProjections, GroupedQueryAttention
    from mortise.layers.paged_attention import BatchLayout
    from mortise.spec.dispatch import DispatchMode

# Shape suffixes: B requests, T tokens, Q new tokens of each request, C cached tokens, S rows of the
# cache, N query heads, G key-value heads, R query heads that share one, D head dimension.


@dataclass(frozen=True, slots=True)
class RequestRows:
    """Requests that bring equally many tokens, and what those see.

    ``tokens`` are theirs among the T of the pass. ``slots`` int64 ``[B, C]`` are their cached rows;
    a request with fewer than C repeats its last, never another's, so that nothing foreign is read
    even to be dropped. ``visible`` bool ``[B, Q, C]`` is causal.
    """

    tokens: slice
    slots: torch.Tensor
    visible: torch.Tensor


class PagedGroupedAttention:
    """Writes new keys and values to the cache, attends to all that each token may see.

    The prompts of a prefill are read one by one, for they differ in length; requests that bring
    equally many tokens in another mode together.

    Args:
        pool: the cache.
        layout: where this pass's tokens sit.
    """

    def __init__(self, pool: KeyValuePool, layout: BatchLayout) -> None:
        self.pool = pool
        self.layout = layout
        self._positions_T = layout.positions()
        table_TP = layout.page_table.index_select(0, layout.rows())
        self._slots_T = _slots(table_TP, self._positions_T.unsqueeze(1)).squeeze(1)
        self._requests = self._plan()

    @property
    def positions(self) -> torch.Tensor:
        """int64 ``[T]``: position of each token in its request."""
        return self._positions_T

    @property
    def dispatch_mode(self) -> DispatchMode:
        """How the tokens travel to their experts."""
        return self.layout.dispatch_mode

    def accept(self, num_tokens: Sequence[int]) -> None:
        """Nothing to do: a row past a request's tokens is written again before it is read."""

    def __call__(
        self, attention: GroupedQueryAttention, projections: GroupedProjections
    ) -> torch.Tensor:
        """Attend for one layer; ``[T, N, D]``."""
        keys_SGD = self.pool.keys(attention.layer).flatten(0, 1)
        values_SGD = self.pool.values(attention.layer).flatten(0, 1)
        keys_SGD.index_copy_(0, self._slots_T, projections.key.to(keys_SGD.dtype))
        values_SGD.index_copy_(0, self._slots_T, projections.value.to(values_SGD.dtype))
        attend = _attended_apart if self.layout.mode is ForwardMode.PREFILL else _attended_as_rows
        query_TND = projections.query
        output_TND = query_TND.new_empty(*query_TND.shape[:2], values_SGD.shape[-1])
        for rows in self._requests:
            output_TND[rows.tokens] = attend(
                query_TND[rows.tokens].unflatten(0, rows.visible.shape[:2]).transpose(1, 2),
                _gathered(keys_SGD, rows.slots),
                _gathered(values_SGD, rows.slots),
                rows.visible,
                attention.shape.softmax_scale,
            ).flatten(0, 1)
        return output_TND

    def _plan(self) -> tuple[RequestRows, ...]:
        """The requests that have new tokens, those together that are read together."""
        lens = self.layout.query_lens
        if not any(lens):
            return ()
        if self.layout.mode is not ForwardMode.PREFILL and len(set(lens)) == 1:
            return (self._rows(slice(0, sum(lens)), 0, len(lens)),)
        ends = accumulate(lens)
        return tuple(
            self._rows(slice(end - query_len, end), request, request + 1)
            for request, (query_len, end) in enumerate(zip(lens, ends, strict=True))
            if query_len
        )

    def _rows(self, tokens: slice, first: int, last: int) -> RequestRows:
        table_BP = self.layout.page_table[first:last]
        context_lens = self.layout.context_lens[first:last]
        everything_C = torch.arange(max(context_lens), device=table_BP.device)
        positions_BQ = self._positions_T[tokens].view(last - first, -1)
        own_BC = torch.minimum(everything_C, positions_BQ[:, -1:])
        return RequestRows(
            tokens, _slots(table_BP, own_BC), everything_C <= positions_BQ.unsqueeze(-1)
        )


def _slots(table_BP: torch.Tensor, positions_BC: torch.Tensor) -> torch.Tensor:
    """Row of the flattened pool, int64 ``[B, C]``, of positions ``[B, C]``."""
    page_BC = table_BP.long().gather(1, positions_BC // PAGE_SIZE)
    return page_BC * PAGE_SIZE + positions_BC % PAGE_SIZE


def _gathered(cached_SGD: torch.Tensor, slots_BC: torch.Tensor) -> torch.Tensor:
    """``[B, G, C, D]`` of cached rows."""
    rows = cached_SGD.index_select(0, slots_BC.flatten())
    return rows.view(*slots_BC.shape, *cached_SGD.shape[1:]).transpose(1, 2)


def _attended_apart(
    query_BNQD: torch.Tensor,
    keys_BGCD: torch.Tensor,
    values_BGCD: torch.Tensor,
    visible_BQC: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Values ``[1, Q, N, D]`` for many tokens of one request; a key-value head is a batch."""
    # Heads that share keys see copies of no memory: one small mask serves all of them, and torch's
    # fused kernels need not know that heads are shared, which those with a mask often do not.
    num_shared = query_BNQD.shape[1] // keys_BGCD.shape[1]
    attended_GRQD = F.scaled_dot_product_attention(
        query_BNQD[0].unflatten(0, (-1, num_shared)),
        keys_BGCD[0].unsqueeze(1).expand(-1, num_shared, -1, -1),
        values_BGCD[0].unsqueeze(1).expand(-1, num_shared, -1, -1),
        attn_mask=visible_BQC[0],
        scale=scale,
    )
    return attended_GRQD.flatten(0, 1).transpose(0, 1).unsqueeze(0)


def _attended_as_rows(
    query_BNQD: torch.Tensor,
    keys_BGCD: torch.Tensor,
    values_BGCD: torch.Tensor,
    visible_BQC: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Values ``[B, Q, N, D]`` for few tokens of each request; keys are read once for all heads."""
    num_heads, query_len = query_BNQD.shape[1:3]
    num_shared = num_heads // keys_BGCD.shape[1]
    attended_BGMD = F.scaled_dot_product_attention(
        # Query heads that share keys are further rows of them.
        query_BNQD.unflatten(1, (-1, num_shared)).flatten(2, 3),
        keys_BGCD,
        values_BGCD,
        attn_mask=visible_BQC.repeat(1, num_shared, 1).unsqueeze(1),
        scale=scale,
    )
    attended: torch.Tensor = attended_BGMD.unflatten(2, (num_shared, query_len))
    return attended.flatten(1, 2).transpose(1, 2)
