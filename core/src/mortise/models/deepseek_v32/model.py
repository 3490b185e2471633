"""The decoder: embedding, layers of latent attention and experts, head."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from mortise.layers.finish import finish_loading
from mortise.layers.mla import Attend, LightningIndexer, MLAttention
from mortise.layers.paged_attention import PagedAttention
from mortise.layers.rotary import RotaryEmbedding
from mortise.models.decoder import Decoder, DecoderLayer, feed_forward, language_head, logits_of
from mortise.models.deepseek_v32.cache import LatentCached
from mortise.models.nextn import NextNDraft
from mortise.spec.dispatch import DispatchMode

if TYPE_CHECKING:
    from mortise.layers.context import LayerContext
    from mortise.models.deepseek_v32.config import LatentMoEConfig
    from mortise.models.family import PagedPass
    from mortise.spec.dispatch import DispatchDecision


class DeepseekV32ForCausalLM(LatentCached, nn.Module):
    """The whole language model of one role.

    Parameters are created empty on the current torch device and dtype; fill them with the
    placements of the family, then call :meth:`finish_loading`.

    Args:
        config: the model's configuration.
        context: hooks, stored schemes, and the other surroundings of this role.
    """

    def __init__(self, config: LatentMoEConfig, context: LayerContext) -> None:
        super().__init__()
        self.config = config
        self.context = context
        self.cached_layers = range(config.num_hidden_layers)
        self.model = Decoder(
            config,
            (decoder_layer(config, index, context, index) for index in self.cached_layers),
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
        assert isinstance(paged_pass, PagedAttention)
        hidden: torch.Tensor = self(
            token_ids_T, paged_pass.positions, paged_pass, paged_pass.dispatch_mode
        )
        return hidden

    def forward(
        self,
        token_ids_T: torch.Tensor,
        positions_T: torch.Tensor,
        attend: Attend,
        mode: DispatchMode = DispatchMode.NORMAL,
    ) -> torch.Tensor:
        """Normalised hidden states ``[T, H]`` of int64 token ids and positions ``[T]``."""
        hidden: torch.Tensor = self.model(token_ids_T, self.rotary(positions_T), attend, mode)
        return hidden

    def logits(self, hidden_TH: torch.Tensor) -> torch.Tensor:
        """float32 ``[T, vocab]`` of normalised hidden states."""
        return logits_of(hidden_TH, self.model, self.lm_head)


class DeepseekV32Draft(LatentCached, NextNDraft):
    """The multi-token prediction layer, which has an indexer of its own where the model has any.

    Args:
        config: the main model's configuration.
        context: hooks, stored schemes, and the other surroundings of the draft role.
    """

    def __init__(self, config: LatentMoEConfig, context: LayerContext) -> None:
        index = config.num_hidden_layers
        layer = decoder_layer(config, index, context, place=0)
        super().__init__(config, context, layer, rotary_embedding(config))
        self.config = config
        self.context = context
        self.cached_layers = (index,)


def decoder_layer(
    config: LatentMoEConfig, index: int, context: LayerContext, place: int
) -> DecoderLayer:
    """The layer of one number in the checkpoint and one place in the cache."""
    name = f"model.layers.{index}"
    attention = MLAttention(
        place,
        config.mla_shape(),
        _indexer(config, index, context, f"{name}.self_attn.indexer"),
        context,
        f"{name}.self_attn",
        shares_keys=index in config.sharing_layers,
    )
    return DecoderLayer(config, attention, feed_forward(config, index, f"{name}.mlp", context))


def rotary_embedding(config: LatentMoEConfig) -> RotaryEmbedding:
    """The rotations that attention and indexer share."""
    with torch.device("cpu"):
        return RotaryEmbedding(
            config.qk_rope_head_dim, config.rope_theta, config.max_position_embeddings, config.yarn
        )


def _indexer(
    config: LatentMoEConfig, layer: int, context: LayerContext, name: str
) -> LightningIndexer | None:
    if not config.has_own_indexer(layer):
        return None
    assert config.q_lora_rank and config.index_n_heads
    assert config.index_head_dim and config.index_topk
    return LightningIndexer(
        context,
        name,
        hidden_size=config.hidden_size,
        q_lora_rank=config.q_lora_rank,
        num_heads=config.index_n_heads,
        head_dim=config.index_head_dim,
        rope_dim=config.qk_rope_head_dim,
        topk=config.index_topk,
        rope_interleave=config.indexer_rope_interleave,
    )
