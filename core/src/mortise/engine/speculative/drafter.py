"""The passes of the draft model: over prompts, from draft to draft, and over what was accepted."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mortise.engine.page_tables import PageTables
from mortise.engine.runner import idle_layout
from mortise.engine.speculative.acceptance import Proposal, draw
from mortise.engine.threads import num_threads
from mortise.layers.paged_attention import BatchLayout
from mortise.spec.roles import ForwardMode

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mortise.engine.batch import Batch
    from mortise.engine.request import Request
    from mortise.models.family import CachePool, CausalLM, DraftModel
    from mortise.spec.dispatch import DispatchMode


class Drafter:
    """Owns the draft model and its cache, whose pages are those of the main model's.

    Row i of the draft reads the hidden state at position i and token i + 1, and says what token
    i + 2 might be. What it says last of a request, a hidden state ``[H]``, is where the next drafts
    begin. Nothing of a request is changed here.

    Args:
        draft: loaded.
        pool: its cache.
        main: whose embedding and head it uses.
        device: where all of them are.
        num_tokens: drafts a step, K.
        threads: of one operation on the processor; None leaves torch's choice.
    """

    def __init__(
        self,
        draft: DraftModel,
        pool: CachePool,
        main: CausalLM,
        device: torch.device,
        num_tokens: int,
        threads: int | None = None,
    ) -> None:
        self.num_tokens = num_tokens
        self._draft = draft
        self._pool = pool
        self._main = main
        self._device = device
        self._threads = threads
        self._tables = PageTables(device)

    def read(
        self,
        batch: Batch,
        hidden_TH: torch.Tensor,
        newest: Sequence[int | None],
        mode: DispatchMode,
    ) -> list[torch.Tensor | None]:
        """Read the rows of a batch of prompts, each beside the token after it.

        Args:
            batch: PREFILL, before anything of it is noted on the requests.
            hidden_TH: the main model's, of all rows.
            newest: the token just chosen for each request; None where its prompt goes on.
            mode: how tokens travel to their experts.

        Returns:
            Where the drafts of each request begin; None where its prompt goes on.
        """
        token_ids: list[int] = []
        for request, token_id, end in zip(batch.requests, newest, batch.context_lens, strict=True):
            following = request.token_ids[end] if token_id is None else token_id
            token_ids += [*request.token_ids[request.num_computed + 1 : end], following]
        output_TH = self._forward(
            ForwardMode.PREFILL,
            batch.requests,
            batch.query_lens,
            batch.context_lens,
            token_ids,
            hidden_TH,
            mode,
        )
        rows = batch.last_rows(range(len(batch.requests)))
        return [
            None if token_id is None else output_TH[row].clone()
            for token_id, row in zip(newest, rows, strict=True)
        ]

    def propose(self, requests: Sequence[Request], mode: DispatchMode) -> list[Proposal]:
        """Draft K tokens for each request.

        The first comes of where its drafts begin; a pass for each further one.
        """
        starts = [request.draft_hidden for request in requests]
        hidden_BH = torch.stack([start for start in starts if start is not None])
        assert len(hidden_BH) == len(requests)
        drafts: list[list[int]] = []
        weights: list[torch.Tensor] = []
        for place in range(self.num_tokens):
            with torch.inference_mode(), num_threads(self._threads):
                token_ids, weights_BV = draw(self._main.logits(hidden_BH), requests)
            drafts.append(token_ids)
            if weights_BV is not None:
                weights.append(weights_BV)
            if place + 1 < self.num_tokens:
                # The first draft stands at the position of the newest token, whose row is missing.
                context_lens = [len(request.token_ids) + place for request in requests]
                hidden_BH = self._forward(
                    ForwardMode.DECODE,
                    requests,
                    [1] * len(requests),
                    context_lens,
                    token_ids,
                    hidden_BH,
                    mode,
                )
        weights_BKV = torch.stack(weights, dim=1) if weights else None
        return [
            Proposal(tuple(token_ids), None if weights_BKV is None else weights_BKV[row])
            for row, token_ids in enumerate(zip(*drafts, strict=True))
        ]

    def extend(
        self,
        batch: Batch,
        hidden_TH: torch.Tensor,
        accepted: Sequence[Sequence[int]],
        mode: DispatchMode,
    ) -> list[torch.Tensor]:
        """Read what was verified, K + 1 rows of every request whatever was accepted of them.

        Rows past the accepted tokens are read for nothing: they are written again before anything
        sees them.

        Args:
            batch: TARGET_VERIFY, before anything of it is noted on the requests.
            hidden_TH: the main model's, of all rows.
            accepted: the new tokens of each request, 1 to K + 1.
            mode: how tokens travel to their experts.

        Returns:
            Where the next drafts of each request begin.
        """
        num_rows = self.num_tokens + 1
        token_ids = [
            token_id for new in accepted for token_id in (*new, *[new[-1]] * (num_rows - len(new)))
        ]
        output_TH = self._forward(
            ForwardMode.DRAFT_EXTEND,
            batch.requests,
            batch.query_lens,
            batch.context_lens,
            token_ids,
            hidden_TH,
            mode,
        )
        return [
            output_TH[place * num_rows + len(new) - 1].clone() for place, new in enumerate(accepted)
        ]

    def idle(self, mode: DispatchMode) -> None:
        """Take part in one pass of other ranks, whose experts are here, with no token."""
        self._run(idle_layout(mode, self._device), [], None)

    def idle_proposals(self, mode: DispatchMode) -> None:
        """Take part in the passes in which other ranks draft."""
        for _ in range(self.num_tokens - 1):
            self.idle(mode)

    def _forward(
        self,
        forward_mode: ForwardMode,
        requests: Sequence[Request],
        query_lens: Sequence[int],
        context_lens: Sequence[int],
        token_ids: Sequence[int],
        hidden_TH: torch.Tensor,
        mode: DispatchMode,
    ) -> torch.Tensor:
        layout = BatchLayout(
            mode=forward_mode,
            query_lens=tuple(query_lens),
            context_lens=tuple(context_lens),
            page_table=self._tables.of([request.pages for request in requests]),
            prompt_lens=tuple(request.num_prompt_tokens for request in requests),
            dispatch_mode=mode,
        )
        return self._run(layout, token_ids, hidden_TH)

    def _run(
        self, layout: BatchLayout, token_ids: Sequence[int], hidden_TH: torch.Tensor | None
    ) -> torch.Tensor:
        with torch.inference_mode(), num_threads(self._threads):
            token_ids_T = torch.tensor(token_ids, dtype=torch.int64, device=self._device)
            embeddings_TH = self._main.embed(token_ids_T)
            if hidden_TH is None:
                hidden_TH = torch.empty_like(embeddings_TH)
            paged_pass = self._draft.new_pass(self._pool, layout)
            return self._draft.run(embeddings_TH, hidden_TH, paged_pass)
