"""The decoder: embedding, layers of latent attention and experts, head."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from mortise.kv.latent import LatentPool
from mortise.layers.finish import finish_loading
from mortise.layers.mla import Attend, LightningIndexer, MLAttention
from mortise.layers.mlp import SwiGLU
from mortise.layers.moe import MoELayer, RoutedExperts
from mortise.layers.norm import RMSNorm
from mortise.layers.paged_attention import PagedAttention
from mortise.layers.rotary import RotaryEmbedding, Rotation
from mortise.layers.router import GroupedSigmoidRouter
from mortise.spec.dispatch import DispatchMode

if TYPE_CHECKING:
    from mortise.layers.context import LayerContext
    from mortise.layers.paged_attention import BatchLayout
    from mortise.models.deepseek_v32.config import LatentMoEConfig
    from mortise.models.family import CachePool, PagedPass
    from mortise.spec.dispatch import DispatchDecision


class DecoderLayer(nn.Module):
    """Attention, then a dense block or experts, each behind a norm and beside a residual.

    Args:
        index: place of the layer in the checkpoint's numbering and in the cache.
    """

    def __init__(self, config: LatentMoEConfig, index: int, context: LayerContext) -> None:
        super().__init__()
        name = f"model.layers.{index}"
        self.schemes = context.schemes
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = MLAttention(
            index,
            config.mla_shape(),
            _indexer(config, index, context, f"{name}.self_attn.indexer"),
            context,
            f"{name}.self_attn",
            shares_keys=index in config.sharing_layers,
        )
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp: SwiGLU | MoELayer
        if config.is_dense(index):
            self.mlp = SwiGLU(context, f"{name}.mlp", config.hidden_size, config.intermediate_size)
        else:
            self.mlp = _moe(config, f"{name}.mlp", context)

    def forward(
        self,
        hidden_TH: torch.Tensor,
        rotation: Rotation,
        attend: Attend,
        mode: DispatchMode = DispatchMode.NORMAL,
    ) -> torch.Tensor:
        """``[T, H]`` to ``[T, H]``; ``mode`` is how tokens travel to their experts."""
        attended_TH = self.self_attn(self.input_layernorm(hidden_TH), rotation, attend)
        hidden_TH = hidden_TH + attended_TH
        normalised_TH = self.post_attention_layernorm(hidden_TH)
        if isinstance(self.mlp, MoELayer):
            output_TH: torch.Tensor = hidden_TH + self.mlp(normalised_TH, mode)
        else:
            output_TH = hidden_TH + self.mlp(normalised_TH)
        return output_TH


class DeepseekV32Model(nn.Module):
    """Embedding, layers and final norm."""

    def __init__(self, config: LatentMoEConfig, context: LayerContext) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(
            config.vocab_size,
            config.hidden_size,
            _weight=torch.empty(config.vocab_size, config.hidden_size),
        )
        self.layers = nn.ModuleList(
            DecoderLayer(config, index, context) for index in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        token_ids_T: torch.Tensor,
        rotation: Rotation,
        attend: Attend,
        mode: DispatchMode = DispatchMode.NORMAL,
    ) -> torch.Tensor:
        """Token ids int64 ``[T]`` to normalised hidden states ``[T, H]``."""
        hidden_TH = self.embed_tokens(token_ids_T)
        for layer in self.layers:
            hidden_TH = layer(hidden_TH, rotation, attend, mode)
        normalised: torch.Tensor = self.norm(hidden_TH)
        return normalised


class DeepseekV32ForCausalLM(nn.Module):
    """The whole language model of one role.

    Parameters are created empty on the current torch device and dtype; fill them with the
    placements of ``weights.py``, then call :meth:`finish_loading`.

    Args:
        config: the model's configuration.
        context: hooks, stored schemes, and the other surroundings of this role.
    """

    def __init__(self, config: LatentMoEConfig, context: LayerContext) -> None:
        super().__init__()
        self.config = config
        self.context = context
        self.model = DeepseekV32Model(config, context)
        self.lm_head: nn.Linear | None = None
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.rotary = rotary_embedding(config)

    def finish_loading(self) -> dict[str, tuple[DispatchDecision, ...]]:
        """Let every layer decide and prepare; after loading and after weight updates."""
        norm = self.model.norm.weight
        self.rotary.to(norm.device)
        return finish_loading(self, norm.dtype)

    def new_pool(
        self,
        num_pages: int,
        dtype: torch.dtype,
        device: torch.device,
        num_slots: int = 0,  # noqa: ARG002
    ) -> LatentPool:
        """An empty cache for every layer; none keeps a state."""
        return LatentPool(
            num_layers=self.config.num_hidden_layers,
            num_pages=num_pages,
            latent_dim=self.config.latent_dim,
            index_dim=self.config.index_head_dim,
            index_layers=[
                layer
                for layer in range(self.config.num_hidden_layers)
                if self.config.has_own_indexer(layer)
            ],
            dtype=dtype,
            device=device,
            index_key_dtype=self.context.index_key_dtype,
        )

    def new_pass(self, pool: CachePool, layout: BatchLayout) -> PagedAttention:
        """Plan one forward pass over the cache."""
        assert isinstance(pool, LatentPool)
        return PagedAttention(self.context.ops, pool, layout, self.config.index_topk)

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
        head = self.model.embed_tokens if self.lm_head is None else self.lm_head
        return F.linear(hidden_TH, head.weight).float()


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


def _moe(config: LatentMoEConfig, name: str, context: LayerContext) -> MoELayer:
    shared_size = config.moe_intermediate_size * config.n_shared_experts
    return MoELayer(
        context,
        name,
        router=GroupedSigmoidRouter(
            hidden_size=config.hidden_size,
            num_experts=config.n_routed_experts,
            num_experts_per_tok=config.num_experts_per_tok,
            n_group=config.n_group,
            topk_group=config.topk_group,
            norm_topk_prob=config.norm_topk_prob,
            routed_scaling_factor=config.routed_scaling_factor,
        ),
        experts=RoutedExperts(
            context,
            f"{name}.experts",
            config.n_routed_experts,
            config.hidden_size,
            config.moe_intermediate_size,
        ),
        shared_experts=(
            SwiGLU(context, f"{name}.shared_experts", config.hidden_size, shared_size)
            if shared_size
            else None
        ),
    )
