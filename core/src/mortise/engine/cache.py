"""The cache of a model: what it takes, making it, and saying so."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from mortise.backends import Decision
from mortise.engine.limits import state_slots
from mortise.engine.memory import memory_for, size_text
from mortise.kv.pages import PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mortise.config import ResolvedConfig
    from mortise.models.family import CachePool, CausalLM, DraftModel
    from mortise.spec.roles import ModelRole


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheNeeds:
    """What the cache of a model takes.

    Args:
        num_pages: pages for the rows of tokens.
        num_slots: requests of which recurrent layers keep a state.
        page_bytes: of all pages.
        state_bytes: of all states; 0 of a model without recurrent layers.
    """

    num_pages: int
    num_slots: int
    page_bytes: int
    state_bytes: int

    @classmethod
    def of(
        cls, model: CausalLM | DraftModel, resolved: ResolvedConfig, dtype: torch.dtype
    ) -> CacheNeeds:
        """Computed without taking any memory."""
        config, meta = resolved.config, torch.device("meta")
        num_pages, num_slots = config.cache.capacity_pages, state_slots(config.scheduler)
        # One page tells what all of them take, and one slot.
        page = model.new_pool(1, dtype, meta).num_bytes
        state = model.new_pool(1, dtype, meta, num_slots=1).num_bytes - page
        return cls(
            num_pages=num_pages,
            num_slots=num_slots,
            page_bytes=page * num_pages,
            state_bytes=state * num_slots,
        )


def new_cache(
    model: CausalLM | DraftModel, needs: CacheNeeds, dtype: torch.dtype, device: torch.device
) -> CachePool:
    """The empty cache.

    Raises:
        CapacityError: there is not enough memory for it; says what takes how much.
    """
    what = f"a cache of {needs.num_pages} pages"
    remedy = "lower cache.max_num_tokens (or cache.num_pages) in the engine configuration"
    if needs.state_bytes:
        what += f" and {needs.num_slots} recurrent states ({size_text(needs.state_bytes)})"
        remedy += ", or scheduler.max_num_seqs"
    with memory_for(what, needs.page_bytes + needs.state_bytes, device, remedy):
        return model.new_pool(needs.num_pages, dtype, device, num_slots=needs.num_slots)


def cache_decisions(
    role: ModelRole, needs: CacheNeeds, resolved: ResolvedConfig
) -> Iterator[Decision]:
    """What the cache is, for ``explain``; states in a line of their own."""
    cache = resolved.config.cache
    key = "cache.max_num_tokens" if cache.num_pages is None else "cache.num_pages"
    yield Decision(
        role=role,
        subject="cache",
        value=f"{needs.num_pages} pages, {size_text(needs.page_bytes)}",
        rule="configuration",
        reason=f"{key} is {cache.num_pages or cache.max_num_tokens}; a page is {PAGE_SIZE} tokens",
        source=resolved.origins[key],
    )
    if needs.state_bytes:
        key = "scheduler.max_num_seqs"
        yield Decision(
            role=role,
            subject="recurrent states",
            value=f"{needs.num_slots} slots, {size_text(needs.state_bytes)}",
            rule="configuration",
            reason=f"one for each of {key} {resolved.config.scheduler.max_num_seqs} requests, and"
            " one for a sequence that is scored",
            source=resolved.origins[key],
        )
    num_drafts = resolved.config.draft.num_tokens
    if needs.state_bytes and num_drafts:
        seqs = resolved.config.scheduler.max_num_seqs
        kept = needs.state_bytes // needs.num_slots * seqs * (num_drafts + 1)
        yield Decision(
            role=role,
            subject="states while verifying",
            value=f"up to {size_text(kept)} for the time of a pass",
            rule="configuration",
            reason=f"one after each of {num_drafts + 1} tokens of scheduler.max_num_seqs {seqs}"
            " requests, since a rejection goes back to an earlier one",
            source=resolved.origins["draft.num_tokens"],
        )
