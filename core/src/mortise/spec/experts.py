"""The weights of a layer's experts as one record: two projections and their prepared layout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mortise.spec.weights import StoredWeight


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertWeights:
    """The experts of one layer that live on this rank.

    Args:
        layer: dotted module name.
        w13: gate over up, ``[E_l, 2I, H]``.
        w2: down, ``[E_l, H, I]``, of a scheme of its own.
        num_local_experts: E_l.
        hidden_size: H.
        intermediate_size: I.
        prepared: what ``prepare_expert_weights`` made of them: opaque to the core, owned by the
            backend, None until prepared.
    """

    layer: str
    w13: StoredWeight
    w2: StoredWeight
    num_local_experts: int
    hidden_size: int
    intermediate_size: int
    prepared: object | None = None
