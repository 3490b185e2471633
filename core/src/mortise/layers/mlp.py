"""The dense SwiGLU block, also used for shared experts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class SwiGLU(nn.Module):
    """``down(silu(gate(x)) * up(x))`` with gate and up in one matrix, gate first."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(hidden_size, 2 * intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, hidden_TH: torch.Tensor) -> torch.Tensor:
        """``[T, H]`` to ``[T, H]``."""
        gate_TI, up_TI = self.gate_up_proj(hidden_TH).chunk(2, dim=-1)
        down: torch.Tensor = self.down_proj(F.silu(gate_TI) * up_TI)
        return down
