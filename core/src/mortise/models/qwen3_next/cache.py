"""What the two kinds of layers keep of a request: rows of the cache, and one state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, assert_never

from mortise.layers.paged_grouped_attention import PagedGroupedAttention
from mortise.layers.recurrence import MovedStates, VerifiedStates
from mortise.spec.roles import ForwardMode

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from mortise.kv.key_values import KeyValuePool
    from mortise.kv.recurrent import RecurrentPool
    from mortise.layers.paged_attention import BatchLayout
    from mortise.spec.dispatch import DispatchMode


@dataclass(frozen=True, slots=True)
class HybridPool:
    """Pages for the attention layers, slots for the gated delta nets."""

    key_values: KeyValuePool
    states: RecurrentPool

    @property
    def num_pages(self) -> int:
        """Pages there are."""
        return self.key_values.num_pages

    @property
    def num_bytes(self) -> int:
        """Memory of pages and slots."""
        return self.key_values.num_bytes + self.states.num_bytes


class HybridPass:
    """One forward pass over both.

    Args:
        pool: pages and slots.
        layout: where this pass's tokens sit.
    """

    def __init__(self, pool: HybridPool, layout: BatchLayout) -> None:
        self.attend = PagedGroupedAttention(pool.key_values, layout)
        self.recur = _recurrence(pool.states, layout)

    @property
    def positions(self) -> torch.Tensor:
        """int64 ``[T]``: position of each token in its request."""
        return self.attend.positions

    @property
    def dispatch_mode(self) -> DispatchMode:
        """How the tokens travel to their experts."""
        return self.attend.dispatch_mode

    def accept(self, num_tokens: Sequence[int]) -> None:
        """Move the states past the accepted tokens of a pass that verified; see ``PagedPass``."""
        assert isinstance(self.recur, VerifiedStates), "the pass moved the states as it ran"
        self.recur.accept(num_tokens)


def _recurrence(states: RecurrentPool, layout: BatchLayout) -> MovedStates | VerifiedStates:
    match layout.mode:
        case ForwardMode.TARGET_VERIFY:
            return VerifiedStates(states, layout)
        case ForwardMode.PREFILL | ForwardMode.DECODE | ForwardMode.IDLE | ForwardMode.DRAFT_EXTEND:
            return MovedStates(states, layout)
        case _:
            assert_never(layout.mode)
