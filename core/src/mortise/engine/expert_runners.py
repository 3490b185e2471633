"""What multiplies the experts, as the backend said it of each layer."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from mortise.backends import Decision
from mortise.layers.moe import MoELayer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

    from mortise.spec.roles import ModelRole


def runner_decisions(role: ModelRole, model: nn.Module) -> Iterator[Decision]:
    """One decision for all layers of which the same was said; none where nothing was.

    Args:
        role: of the model.
        model: loaded.
    """
    alike = Counter(
        module.runner
        for module in model.modules()
        if isinstance(module, MoELayer) and module.runner
    )
    for runner, count in alike.items():
        yield Decision(
            role=role,
            subject="experts",
            value=f"{count} layers by {runner}",
            rule="runner",
            reason="the backend says what multiplies experts of this shape and scheme",
        )
