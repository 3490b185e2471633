"""The language model: decoder layers of grouped-query attention and experts, and a head."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn

from mortise.layers.finish import finish_loading
from mortise.layers.grouped_attention import GroupedAttend, GroupedQueryAttention
from mortise.layers.norm import RMSNorm
from mortise.layers.paged_grouped_attention import PagedGroupedAttention
from mortise.layers.rotary import RotaryEmbedding
from mortise.models.decoder import Decoder, DecoderLayer, feed_forward, language_head, logits_of
from mortise.models.key_value_cached import KeyValueCached
from mortise.models.nextn import NextNDraft
from mortise.spec.dispatch import DispatchMode

if TYPE_CHECKING:
    from mortise.layers.context import LayerContext
    from mortise.models.family import PagedPass
    from mortise.models.glm4_moe.config import Glm4MoeConfig
    from mortise.spec.dispatch import DispatchDecision


class Glm4MoeForCausalLM(KeyValueCached, nn.Module):
    """The whole language model of one role.

    Parameters are created empty on the current torch device and dtype; fill them with the
    placements of the family, then call :meth:`finish_loading`.

    Args:
        config: the model's configuration.
        context: hooks, stored schemes, and the other surroundings of this role.
    """

    def __init__(self, config: Glm4MoeConfig, context: LayerContext) -> None:
        super().__init__()
        self.config = config
        self.context = context
        self.num_cached_layers = config.num_hidden_layers
        self.model = Decoder(
            config,
            (
                decoder_layer(config, index, context, index)
                for index in range(config.num_hidden_layers)
            ),
        )
        self.lm_head = language_head(config)
        self.rotary = rotary_embedding(config)

    def finish_loading(self) -> dict[str, tuple[DispatchDecision, ...]]:
        """Let every layer decide and prepare; after loading and after weight updates."""
        norm = self.model.norm.weight
        self.rotary.to(norm.device)
        return finish_loading(self, norm.dtype)

    def embed(self, token_ids_T: torch.Tensor) -> torch.Tensor:
        """``[T, H]`` of int64 token ids."""
        embedded: torch.Tensor = self.model.embed_tokens(token_ids_T)
        return embedded

    def run(self, token_ids_T: torch.Tensor, paged_pass: PagedPass) -> torch.Tensor:
        """Normalised hidden states ``[T, H]`` of int64 token ids ``[T]``."""
        assert isinstance(paged_pass, PagedGroupedAttention)
        hidden: torch.Tensor = self(
            token_ids_T, paged_pass.positions, paged_pass, paged_pass.dispatch_mode
        )
        return hidden

    def forward(
        self,
        token_ids_T: torch.Tensor,
        positions_T: torch.Tensor,
        attend: GroupedAttend,
        mode: DispatchMode = DispatchMode.NORMAL,
    ) -> torch.Tensor:
        """Normalised hidden states ``[T, H]`` of int64 token ids and positions ``[T]``."""
        hidden: torch.Tensor = self.model(token_ids_T, self.rotary(positions_T), attend, mode)
        return hidden

    def logits(self, hidden_TH: torch.Tensor) -> torch.Tensor:
        """float32 ``[T, vocab]`` of normalised hidden states."""
        return logits_of(hidden_TH, self.model, self.lm_head)


class Glm4MoeDraft(KeyValueCached, NextNDraft):
    """The multi-token prediction layer.

    Args:
        config: the main model's configuration.
        context: hooks, stored schemes, and the other surroundings of the draft role.
    """

    def __init__(self, config: Glm4MoeConfig, context: LayerContext) -> None:
        layer = decoder_layer(config, config.num_hidden_layers, context, place=0)
        super().__init__(config, context, layer, rotary_embedding(config))
        self.config = config
        self.num_cached_layers = 1


def decoder_layer(
    config: Glm4MoeConfig, index: int, context: LayerContext, place: int
) -> DecoderLayer:
    """The layer of one number in the checkpoint and one place in the cache."""
    name = f"model.layers.{index}"
    norm = partial(RMSNorm, eps=config.rms_norm_eps)
    attention = GroupedQueryAttention(
        place,
        config.attention_shape(),
        context,
        f"{name}.self_attn",
        qk_norm=norm if config.use_qk_norm else None,
    )
    return DecoderLayer(config, attention, feed_forward(config, index, f"{name}.mlp", context))


def rotary_embedding(config: Glm4MoeConfig) -> RotaryEmbedding:
    """The rotations that all layers share."""
    with torch.device("cpu"):
        return RotaryEmbedding(
            config.rotary_dim, config.rope_theta, config.max_position_embeddings, config.yarn
        )
