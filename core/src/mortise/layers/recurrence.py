"""What a pass does to the states of its requests: moves them, or waits for what is accepted."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mortise.layers.sequences import Sequences, Steps
from mortise.layers.slot_states import SlotStates

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mortise.kv.recurrent import RecurrentPool
    from mortise.layers.gated_delta_net import GatedDeltaNet, GatedDeltaSteps
    from mortise.layers.paged_attention import BatchLayout


class MovedStates:
    """Every layer moves the states in the slots past all tokens of the pass, as it reads them.

    Args:
        pool: the slots.
        layout: where this pass's tokens sit, and which slot is whose.
    """

    def __init__(self, pool: RecurrentPool, layout: BatchLayout) -> None:
        self._slots = SlotStates(pool, layout)
        self._sequences = Sequences(layout.query_lens, pool.conv_rows + 1, pool.device)

    def __call__(self, net: GatedDeltaNet, hidden_TH: torch.Tensor) -> torch.Tensor:
        """Let a layer read the pass's tokens: ``[T, H]`` to ``[T, H]``."""
        output_TH, state = net.advance(hidden_TH, self._sequences, self._slots.read(net.layer))
        self._slots.write(net.layer, state)
        return output_TH


class VerifiedStates:
    """The pass keeps the states after each token; slots stay as they are until some is accepted.

    A pass that is never accepted, because something failed or a rank only took part, has changed
    nothing. What is kept goes with the pass, and at the latest when it is accepted.

    Args:
        pool: the slots.
        layout: where this pass's tokens sit, as many of every request, and which slot is whose.
    """

    def __init__(self, pool: RecurrentPool, layout: BatchLayout) -> None:
        lens = layout.query_lens
        assert len(set(lens)) <= 1, f"requests verify different numbers of tokens: {lens}"
        self._pool = pool
        self._slots = SlotStates(pool, layout)
        self._steps = Steps(len(lens), max(lens, default=1), pool.conv_rows + 1, pool.device)
        self._num_requests = len(lens)
        self._kept: dict[int, GatedDeltaSteps] = {}
        self._is_accepted = False

    @property
    def num_bytes(self) -> int:
        """Memory of what is kept at the moment, of all layers."""
        return sum(steps.num_bytes for steps in self._kept.values())

    def __call__(self, net: GatedDeltaNet, hidden_TH: torch.Tensor) -> torch.Tensor:
        """Let a layer read the pass's tokens: ``[T, H]`` to ``[T, H]``."""
        assert not self._is_accepted, "the pass was accepted before"
        output_TH, self._kept[net.layer] = net.advance_by_steps(
            hidden_TH, self._steps, self._slots.read(net.layer)
        )
        return output_TH

    def accept(self, num_tokens: Sequence[int]) -> None:
        """Move the states of every layer past the first tokens of each request, once.

        Args:
            num_tokens: accepted tokens of each request, at least one, in the order of the layout.
        """
        assert not self._is_accepted, "the pass was accepted before"
        assert len(self._kept) == self._pool.num_layers, "the pass did not run through every layer"
        assert len(num_tokens) == self._num_requests, "every request accepts some of its tokens"
        assert all(1 <= number <= self._steps.num_steps for number in num_tokens), num_tokens
        num_tokens_B = torch.tensor(num_tokens, dtype=torch.int64, device=self._pool.device)
        for layer, steps in self._kept.items():
            self._slots.write(layer, steps.after(num_tokens_B))
        self._kept.clear()
        self._is_accepted = True
