"""The states of one pass's requests, read from the slots of a pool and put back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mortise.layers.gated_delta_net import GatedDeltaState

if TYPE_CHECKING:
    from mortise.kv.recurrent import RecurrentPool
    from mortise.layers.paged_attention import BatchLayout


class SlotStates:
    """Where recurrent layers find what the tokens before left, and leave what they remember.

    A request whose first token is in this pass begins with nothing, whatever its slot holds: that
    is of a request that went.

    Args:
        pool: the slots.
        layout: where this pass's tokens sit, and which slot is whose.
    """

    def __init__(self, pool: RecurrentPool, layout: BatchLayout) -> None:
        lens = layout.query_lens
        assert len(layout.state_slots) == len(lens), "every request needs a slot"
        assert len(set(layout.state_slots)) == len(lens), "two requests share a slot"
        self._pool = pool
        self._slots_B = torch.tensor(layout.state_slots, dtype=torch.int64, device=pool.device)
        begins = [
            query == context for query, context in zip(lens, layout.context_lens, strict=True)
        ]
        self._begins_B11 = torch.tensor(begins, dtype=torch.bool, device=pool.device).view(-1, 1, 1)

    def read(self, layer: int) -> GatedDeltaState:
        """What the tokens before left with a layer; a copy."""
        conv = self._pool.conv(layer).index_select(0, self._slots_B)
        memory = self._pool.memory(layer).index_select(0, self._slots_B)
        return GatedDeltaState(
            conv=conv.masked_fill_(self._begins_B11, 0),
            recurrent=memory.masked_fill_(self._begins_B11.unsqueeze(-1), 0),
        )

    def write(self, layer: int, state: GatedDeltaState) -> None:
        """Keep what a layer remembers from now on."""
        self._pool.conv(layer).index_copy_(0, self._slots_B, state.conv)
        self._pool.memory(layer).index_copy_(0, self._slots_B, state.recurrent)
