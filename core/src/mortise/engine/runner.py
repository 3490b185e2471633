"""One forward pass of the main model: from a batch to hidden states, and from those to logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from mortise.engine.page_tables import PageTables
from mortise.engine.scheduler import slot_of
from mortise.engine.threads import num_threads
from mortise.layers.paged_attention import BatchLayout
from mortise.spec.dispatch import DispatchMode
from mortise.spec.roles import ForwardMode

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mortise.engine.batch import Batch
    from mortise.models.family import CachePool, CausalLM, PagedPass


@dataclass(frozen=True, slots=True)
class PassOutput:
    """What a pass gives: normalised hidden states ``[T, H]``, and the pass itself."""

    hidden_TH: torch.Tensor
    paged_pass: PagedPass


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
        self._tables = PageTables(device)

    def run(self, batch: Batch, dispatch_mode: DispatchMode = DispatchMode.NORMAL) -> PassOutput:
        """Write the batch's tokens to the cache.

        Args:
            batch: what to compute.
            dispatch_mode: how tokens travel to their experts; the same on every rank.
        """
        layout = BatchLayout(
            mode=batch.mode,
            query_lens=batch.query_lens,
            context_lens=batch.context_lens,
            page_table=self._tables.of([request.pages for request in batch.requests]),
            prompt_lens=tuple(request.num_prompt_tokens for request in batch.requests),
            dispatch_mode=dispatch_mode,
            state_slots=tuple(map(slot_of, batch.requests)),
        )
        return self._forward(batch.token_ids(), layout)

    def idle(self, dispatch_mode: DispatchMode) -> None:
        """Take part in a pass of other ranks, whose experts are here, with no token."""
        self._forward([], idle_layout(dispatch_mode, self.device))

    def logits(self, hidden_TH: torch.Tensor, rows: Sequence[int] | None = None) -> torch.Tensor:
        """float32 ``[T, vocab]`` of hidden states, or of some of their rows."""
        with torch.inference_mode(), num_threads(self._threads):
            if rows is not None and list(rows) != list(range(len(hidden_TH))):
                hidden_TH = hidden_TH[list(rows)]
            return self.model.logits(hidden_TH)

    def score(
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
                page_table=self._tables.of([pages]),
                prompt_lens=(len(token_ids),),
                dispatch_mode=dispatch_mode,
                state_slots=(state_slot,),
            )
            parts.append(self.logits(self._forward(token_ids[start:end], layout).hidden_TH))
        return torch.cat(parts)

    def _forward(self, token_ids: Sequence[int], layout: BatchLayout) -> PassOutput:
        with torch.inference_mode(), num_threads(self._threads):
            token_ids_T = torch.tensor(token_ids, dtype=torch.int64, device=self.device)
            paged_pass = self.model.new_pass(self.pool, layout)
            return PassOutput(self.model.run(token_ids_T, paged_pass), paged_pass)


def idle_layout(dispatch_mode: DispatchMode, device: torch.device) -> BatchLayout:
    """The layout of a pass without a token."""
    return BatchLayout(
        mode=ForwardMode.IDLE,
        query_lens=(),
        context_lens=(),
        page_table=torch.empty(0, 0, dtype=torch.int32, device=device),
        dispatch_mode=dispatch_mode,
    )
