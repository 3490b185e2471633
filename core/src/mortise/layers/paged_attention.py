"""Latent attention over a paged cache, for one forward pass of a batch of requests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, assert_never

import torch
import torch.nn.functional as F

from mortise.kv.pages import PAGE_SIZE
from mortise.layers.index_selection import RowSpan, select_keys
from mortise.spec.dispatch import DispatchMode
from mortise.spec.roles import ForwardMode

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mortise.backends.ops import Ops
    from mortise.kv.latent import LatentPool
    from mortise.layers.mla import IndexProjections, MLAProjections, MLAttention
    from mortise.spec.paged_mqa import PagedMQAMetadata


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchLayout:
    """Where the tokens of one forward pass sit. B requests, T tokens, all of one mode.

    Args:
        mode: what kind of pass this is.
        query_lens: new tokens of each request, B integers that sum to T.
        context_lens: tokens of each request when this pass is done, B integers.
        page_table: int32 ``[B, pages]``, each row padded with any valid page.
        prompt_lens: tokens that each request was given, B integers, or None: all there are in a
            prefill, none in other modes. Ties between index scores are resolved over the prompt.
        dispatch_mode: how the tokens travel to their experts; the same on every rank.
        state_slots: where recurrent layers keep what they know of each request, B integers; empty
            where no layer does.
    """

    mode: ForwardMode
    query_lens: tuple[int, ...]
    context_lens: tuple[int, ...]
    page_table: torch.Tensor
    prompt_lens: tuple[int, ...] | None = None
    dispatch_mode: DispatchMode = DispatchMode.NORMAL
    state_slots: tuple[int, ...] = ()

    @classmethod
    def build(
        cls,
        mode: ForwardMode,
        query_lens: Sequence[int],
        context_lens: Sequence[int],
        pages: Sequence[Sequence[int]],
        device: torch.device,
        prompt_lens: Sequence[int] | None = None,
        state_slots: Sequence[int] = (),
    ) -> BatchLayout:
        """From each request's own list of pages."""
        width = max((len(own) for own in pages), default=0)
        table = [[*own, *[0] * (width - len(own))] for own in pages]
        return cls(
            mode=mode,
            query_lens=tuple(query_lens),
            context_lens=tuple(context_lens),
            page_table=torch.tensor(table, dtype=torch.int32, device=device).view(
                len(pages), width
            ),
            prompt_lens=None if prompt_lens is None else tuple(prompt_lens),
            state_slots=tuple(state_slots),
        )

    def positions(self) -> torch.Tensor:
        """int64 ``[T]``: position of each new token in its request."""
        ranges = [
            torch.arange(context - query, context)
            for query, context in zip(self.query_lens, self.context_lens, strict=True)
        ]
        flat = torch.cat(ranges) if ranges else torch.empty(0, dtype=torch.int64)
        return flat.to(self.page_table.device)

    def rows(self) -> torch.Tensor:
        """int64 ``[T]``: the request of each new token."""
        lens = torch.tensor(self.query_lens, dtype=torch.int64)
        return torch.arange(len(lens)).repeat_interleave(lens).to(self.page_table.device)

    def row_spans(self) -> tuple[RowSpan, ...]:
        """How many keys each row chooses among: a prompt's tokens all of it, others what they see.

        So a row's choice is the same however its prompt was chunked, whether it was decoded,
        drafted and verified, or computed again.
        """
        spans, row = [], 0
        for query_len, context_len, prompt_len in zip(
            self.query_lens, self.context_lens, self._prompt_lens(), strict=True
        ):
            position = context_len - query_len
            of_prompt = min(max(prompt_len - position, 0), query_len)
            if of_prompt:
                spans.append(RowSpan(row, row + of_prompt, prompt_len))
            spans += [
                RowSpan(row + offset, row + offset + 1, position + offset + 1)
                for offset in range(of_prompt, query_len)
            ]
            row += query_len
        return tuple(spans)

    def _prompt_lens(self) -> tuple[int, ...]:
        if self.prompt_lens is not None:
            return self.prompt_lens
        whole = self.mode is ForwardMode.PREFILL
        return self.context_lens if whole else (0,) * len(self.context_lens)


@dataclass(frozen=True, slots=True)
class KeyRows:
    """Cached rows that each token attends to: int64 ``slots`` ``[T, C]``, and a bias ``[T, 1, C]``.

    The bias is minus infinity where a token has fewer than C. Such a place repeats a row that the
    token sees, never another request's, so that nothing foreign is read even to be dropped.
    """

    slots: torch.Tensor
    bias: torch.Tensor


class PagedAttention:
    """Writes new rows to the cache, picks keys by the indexer, attends.

    Prefill expands cached latents to keys and values; every other mode keeps the queries in latent
    space, which reads each cached row once for all heads (arXiv 2405.04434 section 2.1.2).

    Args:
        ops: the bound hooks of the model's role.
        pool: the cache.
        layout: where this pass's tokens sit.
        index_topk: keys the indexer picks, or None without an indexer.
    """

    def __init__(
        self, ops: Ops, pool: LatentPool, layout: BatchLayout, index_topk: int | None
    ) -> None:
        self.ops = ops
        self.pool = pool
        self.layout = layout
        self._positions_T = layout.positions()
        self.page_table_TP = layout.page_table.index_select(0, layout.rows())
        self._first_slots_TP = self.page_table_TP.long() * PAGE_SIZE
        self.slots_T = self._slots(self._positions_T.unsqueeze(1)).squeeze(1)
        self.visible_T = self._positions_T + 1
        self.max_context_len = max(layout.context_lens, default=0)
        self.index_topk = index_topk
        self.metadata = self._plan() if self._is_sparse else None
        self.spans = layout.row_spans() if self._is_sparse else ()
        self._every_key: KeyRows | None = None
        # The latest choice of an indexer, which later layers may share, and its rows once needed.
        self._chosen_TK: torch.Tensor | None = None
        self._chosen_rows: KeyRows | None = None

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

    @property
    def _is_sparse(self) -> bool:
        return self.index_topk is not None and self.max_context_len > self.index_topk

    def _plan(self) -> PagedMQAMetadata:
        return self.ops.paged_mqa_metadata(
            self.visible_T.to(torch.int32).unsqueeze(1),
            PAGE_SIZE,
            self.ops.capabilities.num_workers,
            self.layout.mode,
        )

    def __call__(self, attention: MLAttention, projections: MLAProjections) -> torch.Tensor:
        """Attend for one layer; ``[T, N, v_head_dim]``."""
        pool, layer = self.pool, attention.layer
        _write(pool.latents(layer), self.slots_T, projections.latent)
        if projections.index is not None:
            pool.index_keys.write(layer, self.slots_T, projections.index.key)
        if not attention.shares_keys:
            self._chosen_TK = self._choose(layer, projections.index)
            self._chosen_rows = None
        match self.layout.mode:
            case ForwardMode.PREFILL:
                return self._expanded(attention, projections, self._chosen_TK)
            case (
                ForwardMode.DECODE
                | ForwardMode.IDLE
                | ForwardMode.TARGET_VERIFY
                | ForwardMode.DRAFT_EXTEND
            ):
                return self._absorbed(attention, projections, self._key_rows())
            case _:
                assert_never(self.layout.mode)

    def _choose(self, layer: int, index: IndexProjections | None) -> torch.Tensor | None:
        """Positions int64 ``[T, K]`` (-1: none) that each token may see, or None for all."""
        if index is None or self.metadata is None:
            return None
        assert self.index_topk is not None
        keys = self.pool.index_keys
        logits_TC = self.ops.paged_mqa_logits(
            keys.turned(index.query).unsqueeze(1),
            keys.pages(layer),
            index.weights,
            self.page_table_TP,
            self.metadata,
        )
        return select_keys(
            logits_TC[:, : self.max_context_len], self.visible_T, self.index_topk, self.spans
        )

    def _key_rows(self) -> KeyRows:
        """Rows of the chosen positions, or of all, which are the same for every layer."""
        chosen_TK = self._chosen_TK
        if chosen_TK is not None:
            if self._chosen_rows is None:
                slots_TK = self._slots(chosen_TK.clamp(min=0))
                self._chosen_rows = KeyRows(slots_TK, self._bias(chosen_TK < 0))
            return self._chosen_rows
        if self._every_key is None:
            everything = torch.arange(self.max_context_len, device=self._positions_T.device)
            own_TC = torch.minimum(everything, self._positions_T.unsqueeze(1))
            self._every_key = KeyRows(self._slots(own_TC), self._bias(own_TC < everything))
        return self._every_key

    def _slots(self, positions_TC: torch.Tensor) -> torch.Tensor:
        """Row of the flattened pool, int64 ``[T, C]``, of positions ``[T, C]``."""
        first_TC = self._first_slots_TP.gather(1, positions_TC // PAGE_SIZE)
        return first_TC + positions_TC % PAGE_SIZE

    def _bias(self, hidden_TC: torch.Tensor) -> torch.Tensor:
        bias_TC = torch.zeros(hidden_TC.shape, dtype=self.pool.dtype, device=hidden_TC.device)
        return bias_TC.masked_fill_(hidden_TC, float("-inf")).unsqueeze(1)

    def _expanded(
        self, attention: MLAttention, projections: MLAProjections, chosen_TK: torch.Tensor | None
    ) -> torch.Tensor:
        query_TND = torch.cat([projections.query_nope, projections.query_rope], dim=-1)
        output_TNV = query_TND.new_empty(*query_TND.shape[:2], attention.shape.v_head_dim)
        layout, start = self.layout, 0
        latents_PSL = self.pool.latents(attention.layer)
        for row, (query_len, context) in enumerate(
            zip(layout.query_lens, layout.context_lens, strict=True)
        ):
            tokens = slice(start, start + query_len)
            start += query_len
            pages = layout.page_table[row, : -(-context // PAGE_SIZE)]
            latent_CL = latents_PSL.index_select(0, pages).flatten(0, 1)[:context]
            keys_NCD, values_NCV = attention.expand(latent_CL)
            chosen = None if chosen_TK is None else chosen_TK[tokens]
            mask_QC = _visible_mask(self.visible_T[tokens], context, chosen)
            output_TNV[tokens] = _attended(
                query_TND[tokens], keys_NCD, values_NCV, mask_QC, attention.shape.softmax_scale
            )
        return output_TNV

    def _absorbed(
        self, attention: MLAttention, projections: MLAProjections, keys: KeyRows
    ) -> torch.Tensor:
        shape = attention.shape
        latents_RL = self.pool.latents(attention.layer).flatten(0, 1)
        cached_TCL = latents_RL.index_select(0, keys.slots.flatten()).view(
            *keys.slots.shape, latents_RL.shape[-1]
        )
        key_NDL, value_NVL = attention.absorbed()
        absorbed_NTL = torch.bmm(projections.query_nope.transpose(0, 1), key_NDL)
        query_TNL = torch.cat([absorbed_NTL.transpose(0, 1), projections.query_rope], dim=-1)
        scores_TNC = torch.baddbmm(
            keys.bias, query_TNL, cached_TCL.transpose(1, 2), alpha=shape.softmax_scale
        )
        weights_TNC = scores_TNC.softmax(dim=-1, dtype=torch.float32).to(cached_TCL.dtype)
        latent_TNL = torch.bmm(weights_TNC, cached_TCL[..., : shape.kv_lora_rank])
        return torch.bmm(latent_TNL.transpose(0, 1), value_NVL.transpose(1, 2)).transpose(0, 1)


def _write(pages_PSD: torch.Tensor, slots_T: torch.Tensor, rows_TD: torch.Tensor) -> None:
    pages_PSD.view(-1, rows_TD.shape[-1]).index_copy_(0, slots_T, rows_TD.to(pages_PSD.dtype))


def _attended(
    query_QND: torch.Tensor,
    keys_NCD: torch.Tensor,
    values_NCV: torch.Tensor,
    mask_QC: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Values attended to, ``[Q, N, V]``."""
    # Torch's fused kernels want values as wide as keys; the others keep all weights in memory.
    missing = max(keys_NCD.shape[-1] - values_NCV.shape[-1], 0)
    widened_NCD = F.pad(values_NCV, (0, missing))
    attended_BNQD = F.scaled_dot_product_attention(
        query_QND.transpose(0, 1).unsqueeze(0),
        keys_NCD.unsqueeze(0),
        widened_NCD.unsqueeze(0),
        attn_mask=mask_QC,
        scale=scale,
    )
    return attended_BNQD[0, :, :, : values_NCV.shape[-1]].transpose(0, 1)


def _visible_mask(
    visible_Q: torch.Tensor, context: int, chosen_QK: torch.Tensor | None
) -> torch.Tensor:
    """bool ``[Q, C]``: causal, and where keys were chosen, those alone."""
    columns = torch.arange(context, device=visible_Q.device)
    causal_QC = columns < visible_Q.unsqueeze(1)
    if chosen_QK is None:
        return causal_QC
    # One spare column takes the -1 padding.
    picked = torch.zeros(len(visible_Q), context + 1, dtype=torch.bool, device=visible_Q.device)
    picked.scatter_(1, torch.where(chosen_QK < 0, context, chosen_QK), True)
    return causal_QC & picked[:, :context]
