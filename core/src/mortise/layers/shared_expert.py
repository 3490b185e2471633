"""The shared expert that a gate weighs for each token."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from mortise.layers.linear import linear, projection_placements
from mortise.layers.mlp import SwiGLU

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mortise.checkpoint.placement import Placement
    from mortise.layers.context import LayerContext


class GatedSharedExpert(nn.Module):
    """``sigmoid(gate(x)) * block(x)``, one number a token (Qwen2-MoE and its successors).

    Args:
        context: where the model is built.
        name: dotted name of the layer of experts in the checkpoint (``model.layers.3.mlp``).
        hidden_size, intermediate_size: of the block.
    """

    def __init__(
        self, context: LayerContext, name: str, hidden_size: int, intermediate_size: int
    ) -> None:
        super().__init__()
        self._schemes = context.schemes
        self._gate = (f"{name}.shared_expert_gate",)
        self.gate = linear(context, self._gate, hidden_size, 1)
        self.block = SwiGLU(context, f"{name}.shared_expert", hidden_size, intermediate_size)

    def placements(self) -> Iterator[Placement]:
        """Where its tensors go."""
        yield from projection_placements(self._schemes, self._gate, self.gate)
        yield from self.block.placements()

    def forward(self, hidden_TH: torch.Tensor) -> torch.Tensor:
        """``[T, H]`` to ``[T, H]``."""
        gate_T1: torch.Tensor = self.gate(hidden_TH)
        weighed: torch.Tensor = gate_T1.sigmoid() * self.block(hidden_TH)
        return weighed
