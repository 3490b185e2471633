"""The dense SwiGLU block, also used for shared experts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from mortise.layers.linear import linear, projection_placements

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mortise.checkpoint.placement import Placement
    from mortise.layers.context import LayerContext


class SwiGLU(nn.Module):
    """``down(silu(gate(x)) * up(x))`` with gate and up in one matrix, gate first.

    Args:
        context: where the model is built.
        name: dotted name in the checkpoint.
        hidden_size, intermediate_size: of the block.
    """

    def __init__(
        self, context: LayerContext, name: str, hidden_size: int, intermediate_size: int
    ) -> None:
        super().__init__()
        self._schemes = context.schemes
        self._gate_up = (f"{name}.gate_proj", f"{name}.up_proj")
        self._down = (f"{name}.down_proj",)
        self.gate_up_proj = linear(context, self._gate_up, hidden_size, 2 * intermediate_size)
        self.down_proj = linear(context, self._down, intermediate_size, hidden_size)

    def placements(self) -> Iterator[Placement]:
        """Where its tensors go."""
        yield from projection_placements(self._schemes, self._gate_up, self.gate_up_proj)
        yield from projection_placements(self._schemes, self._down, self.down_proj)

    def forward(self, hidden_TH: torch.Tensor) -> torch.Tensor:
        """``[T, H]`` to ``[T, H]``."""
        gate_TI, up_TI = self.gate_up_proj(hidden_TH).chunk(2, dim=-1)
        down: torch.Tensor = self.down_proj(F.silu(gate_TI) * up_TI)
        return down
