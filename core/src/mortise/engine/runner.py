"""One forward pass: from a batch to the logits of the rows that need them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mortise.engine.scheduler import slot_of
from mortise.engine.threads import num_threads
from mortise.layers.paged_attention import BatchLayout
from mortise.spec.dispatch import DispatchMode
from mortise.spec.roles import ForwardMode

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mortise.engine.scheduler import Batch
    from mortise.models.family import CachePool, CausalLM


class Runner:
    """Owns the model and its cache.

    Args:
        model: loaded.
        pool: its cache.
        device: where both are.
        threads: of one operation on the processor; None leaves torch's choice.
    """

    def __init__(
        self, model: CausalLM, pool: CachePool, device: torch.device, threads: int | None = None
    ) -> None:
        self.model = model
        self.pool = pool
        self.device = device
        self._threads = threads
        self._page_lists: list[list[int]] = []
        self._page_table = torch.empty(0, 0, dtype=torch.int32, device=device)

    def run(
        self,
        batch: Batch,
        sampled: Sequence[int],
        dispatch_mode: DispatchMode = DispatchMode.NORMAL,
    ) -> torch.Tensor:
        """Write the batch's tokens to the cache.

        Args:
            batch: what to compute.
            sampled: places of the requests whose last row is wanted, ascending.
            dispatch_mode: how tokens travel to their experts; the same on every rank.

        Returns:
            float32 ``[len(sampled), vocab]``.
        """
        token_ids: list[int] = []
        context_lens: list[int] = []
        for request, query_len in zip(batch.requests, batch.query_lens, strict=True):
            end = request.num_computed + query_len
            token_ids += request.token_ids[request.num_computed : end]
            context_lens.append(end)
        layout = BatchLayout(
            mode=batch.mode,
            query_lens=batch.query_lens,
            context_lens=tuple(context_lens),
            page_table=self._table([request.pages for request in batch.requests]),
            prompt_lens=tuple(request.num_prompt_tokens for request in batch.requests),
            dispatch_mode=dispatch_mode,
            state_slots=tuple(map(slot_of, batch.requests)),
        )
        return self._forward(token_ids, layout, _last_rows(batch, sampled))

    def idle(self, dispatch_mode: DispatchMode) -> None:
        """Take part in a pass of other ranks, whose experts are here, with no token."""
        layout = BatchLayout(
            mode=ForwardMode.IDLE,
            query_lens=(),
            context_lens=(),
            page_table=torch.empty(0, 0, dtype=torch.int32, device=self.device),
            dispatch_mode=dispatch_mode,
        )
        self._forward([], layout, [])

    def logits(
        self,
        token_ids: Sequence[int],
        pages: list[int],
        chunk: int,
        dispatch_mode: DispatchMode = DispatchMode.NORMAL,
        state_slot: int = 0,
    ) -> torch.Tensor:
        """float32 ``[T, vocab]``: every position of one sequence, computed in chunks.

        Args:
            token_ids: T ids.
            pages: pages for all of them, which nobody else uses meanwhile.
            chunk: tokens in one pass.
            dispatch_mode: how tokens travel to their experts; the same on every rank.
            state_slot: for what recurrent layers remember, which nobody else uses meanwhile.
        """
        parts = []
        for start in range(0, len(token_ids), chunk):
            end = min(start + chunk, len(token_ids))
            layout = BatchLayout(
                mode=ForwardMode.PREFILL,
                query_lens=(end - start,),
                context_lens=(end,),
                page_table=self._table([pages]),
                prompt_lens=(len(token_ids),),
                dispatch_mode=dispatch_mode,
                state_slots=(state_slot,),
            )
            parts.append(self._forward(list(token_ids[start:end]), layout, None))
        return torch.cat(parts)

    def _forward(
        self, token_ids: list[int], layout: BatchLayout, rows: list[int] | None
    ) -> torch.Tensor:
        """Logits of some rows, or of all."""
        with torch.inference_mode(), num_threads(self._threads):
            token_ids_T = torch.tensor(token_ids, dtype=torch.int64, device=self.device)
            paged_pass = self.model.new_pass(self.pool, layout)
            hidden_TH = self.model.run(token_ids_T, paged_pass)
            if rows is not None and len(rows) < len(token_ids):
                hidden_TH = hidden_TH[rows]
            return self.model.logits(hidden_TH)

    def _table(self, page_lists: list[list[int]]) -> torch.Tensor:
        """int32 ``[B, pages]``; made anew only when a request came, went or took a page."""
        if page_lists != self._page_lists:
            width = max(map(len, page_lists))
            table = [[*pages, *[0] * (width - len(pages))] for pages in page_lists]
            self._page_table = torch.tensor(table, dtype=torch.int32, device=self.device)
            self._page_lists = [list(pages) for pages in page_lists]
        return self._page_table


def _last_rows(batch: Batch, sampled: Sequence[int]) -> list[int]:
    """The row of each sampled request's last token."""
    ends, end = [], 0
    for query_len in batch.query_lens:
        end += query_len
        ends.append(end - 1)
    return [ends[place] for place in sampled]
