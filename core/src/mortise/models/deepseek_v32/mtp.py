"""The multi-token prediction layer, which guesses one token further than the model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from mortise.layers.linear import linear
from mortise.layers.norm import RMSNorm
from mortise.models.deepseek_v32.model import decoder_layer

if TYPE_CHECKING:
    from mortise.layers.context import LayerContext
    from mortise.layers.mla import Attend
    from mortise.layers.rotary import Rotation
    from mortise.models.deepseek_v32.config import LatentMoEConfig


class DeepseekV32MTP(nn.Module):
    """One multi-token prediction module (arXiv 2412.19437 section 2.2).

    It reads the model's normalised hidden state at position i beside the embedding of token i + 1,
    and its normalised output, through the model's head, predicts token i + 2. Embedding and head
    are the main model's.

    Args:
        index: layer number in the checkpoint, ``num_hidden_layers`` and up.
    """

    def __init__(self, config: LatentMoEConfig, index: int, context: LayerContext) -> None:
        super().__init__()
        hidden_size, eps = config.hidden_size, config.rms_norm_eps
        self.enorm = RMSNorm(hidden_size, eps)
        self.hnorm = RMSNorm(hidden_size, eps)
        name = f"model.layers.{index}.eh_proj"
        self.eh_proj = linear(context, [name], 2 * hidden_size, hidden_size)
        self.schemes = context.schemes
        self.layer = decoder_layer(config, index, context)
        self.norm = RMSNorm(hidden_size, eps)

    def forward(
        self,
        hidden_TH: torch.Tensor,
        next_embedding_TH: torch.Tensor,
        rotation: Rotation,
        attend: Attend,
    ) -> torch.Tensor:
        """Normalised hidden states ``[T, H]`` for the model's head."""
        joined = torch.cat([self.enorm(next_embedding_TH), self.hnorm(hidden_TH)], dim=-1)
        output: torch.Tensor = self.norm(self.layer(self.eh_proj(joined), rotation, attend))
        return output
