"""The decoder: embedding, layers of gated delta nets or gated attention with experts, head."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from mortise.kv.key_values import KeyValuePool
from mortise.kv.recurrent import RecurrentPool
from mortise.layers.finish import finish_loading
from mortise.layers.gated_delta_net import GatedDeltaNet, Recur
from mortise.layers.grouped_attention import GroupedAttend, GroupedQueryAttention
from mortise.layers.mlp import SwiGLU
from mortise.layers.moe import MoELayer, RoutedExperts
from mortise.layers.norm import ZeroCentredRMSNorm
from mortise.layers.rotary import RotaryEmbedding, Rotation
from mortise.layers.router import SoftmaxRouter
from mortise.layers.shared_expert import GatedSharedExpert
from mortise.models.qwen3_next.cache import HybridPass, HybridPool
from mortise.spec.dispatch import DispatchMode

if TYPE_CHECKING:
    from mortise.layers.context import LayerContext
    from mortise.layers.paged_attention import BatchLayout
    from mortise.models.family import CachePool, PagedPass
    from mortise.models.qwen3_next.config import Qwen3NextConfig
    from mortise.spec.dispatch import DispatchDecision


class DecoderLayer(nn.Module):
    """A gated delta net or attention, then experts, each behind a norm and beside a residual.

    Args:
        index: place of the layer in the checkpoint's numbering.
    """

    def __init__(self, config: Qwen3NextConfig, index: int, context: LayerContext) -> None:
        super().__init__()
        name = f"{config.decoder_name}.layers.{index}"
        self.schemes = context.schemes
        self.linear_attn: GatedDeltaNet | None = None
        self.self_attn: GroupedQueryAttention | None = None
        if config.is_recurrent(index):
            self.linear_attn = _delta_net(config, index, f"{name}.linear_attn", context)
        else:
            self.self_attn = _attention(config, index, f"{name}.self_attn", context)
        self.mlp: SwiGLU | MoELayer
        if config.is_dense(index):
            self.mlp = SwiGLU(context, f"{name}.mlp", config.hidden_size, config.intermediate_size)
        else:
            self.mlp = _moe(config, f"{name}.mlp", context)
        self.input_layernorm = ZeroCentredRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = ZeroCentredRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        hidden_TH: torch.Tensor,
        rotation: Rotation,
        attend: GroupedAttend,
        recur: Recur,
        mode: DispatchMode = DispatchMode.NORMAL,
    ) -> torch.Tensor:
        """``[T, H]`` to ``[T, H]``; ``mode`` is how tokens travel to their experts."""
        normalised_TH = self.input_layernorm(hidden_TH)
        if self.linear_attn is not None:
            hidden_TH = hidden_TH + self.linear_attn(normalised_TH, recur)
        else:
            assert self.self_attn is not None
            hidden_TH = hidden_TH + self.self_attn(normalised_TH, rotation, attend)
        normalised_TH = self.post_attention_layernorm(hidden_TH)
        if isinstance(self.mlp, MoELayer):
            output_TH: torch.Tensor = hidden_TH + self.mlp(normalised_TH, mode)
        else:
            output_TH = hidden_TH + self.mlp(normalised_TH)
        return output_TH


class Qwen3NextModel(nn.Module):
    """Embedding, layers and final norm."""

    def __init__(self, config: Qwen3NextConfig, context: LayerContext) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(
            config.vocab_size,
            config.hidden_size,
            _weight=torch.empty(config.vocab_size, config.hidden_size),
        )
        self.layers = nn.ModuleList(
            DecoderLayer(config, index, context) for index in range(config.num_hidden_layers)
        )
        self.norm = ZeroCentredRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        token_ids_T: torch.Tensor,
        rotation: Rotation,
        attend: GroupedAttend,
        recur: Recur,
        mode: DispatchMode = DispatchMode.NORMAL,
    ) -> torch.Tensor:
        """Token ids int64 ``[T]`` to normalised hidden states ``[T, H]``."""
        hidden_TH = self.embed_tokens(token_ids_T)
        for layer in self.layers:
            hidden_TH = layer(hidden_TH, rotation, attend, recur, mode)
        normalised: torch.Tensor = self.norm(hidden_TH)
        return normalised


class Qwen3NextForCausalLM(nn.Module):
    """The whole language model of one role.

    Parameters are created empty on the current torch device and dtype; fill them with the
    placements of ``weights.py``, then call :meth:`finish_loading`.

    Args:
        config: the model's configuration.
        context: hooks, stored schemes, and the other surroundings of this role.
    """

    def __init__(self, config: Qwen3NextConfig, context: LayerContext) -> None:
        super().__init__()
        self.config = config
        self.model = Qwen3NextModel(config, context)
        self.lm_head: nn.Linear | None = None
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        with torch.device("cpu"):
            self.rotary = RotaryEmbedding(
                config.rotary_dim, config.rope_theta, config.max_position_embeddings, config.yarn
            )

    def finish_loading(self) -> dict[str, tuple[DispatchDecision, ...]]:
        """Let every layer decide and prepare; after loading and after weight updates."""
        norm = self.model.norm.weight
        self.rotary.to(norm.device)
        return finish_loading(self, norm.dtype)

    def new_pool(
        self, num_pages: int, dtype: torch.dtype, device: torch.device, num_slots: int = 0
    ) -> HybridPool:
        """Empty pages for the attention layers, and slots for the states of the others."""
        config = self.config
        shape = config.qkv_shape()
        return HybridPool(
            KeyValuePool(
                num_layers=config.num_hidden_layers - config.num_recurrent_layers,
                num_pages=num_pages,
                num_heads=config.num_key_value_heads,
                key_dim=config.head_dim,
                value_dim=config.head_dim,
                dtype=dtype,
                device=device,
            ),
            RecurrentPool(
                num_layers=config.num_recurrent_layers,
                num_slots=num_slots,
                conv_rows=config.linear_conv_kernel_dim - 1,
                channels=2 * shape.num_key_heads * shape.key_head_dim
                + shape.num_value_heads * shape.value_head_dim,
                num_heads=shape.num_value_heads,
                key_dim=shape.key_head_dim,
                value_dim=shape.value_head_dim,
                dtype=dtype,
                device=device,
            ),
        )

    def new_pass(self, pool: CachePool, layout: BatchLayout) -> HybridPass:
        """Plan one forward pass over pages and slots."""
        assert isinstance(pool, HybridPool)
        return HybridPass(pool, layout)

    def embed(self, token_ids_T: torch.Tensor) -> torch.Tensor:
        """``[T, H]`` of int64 token ids."""
        embedded: torch.Tensor = self.model.embed_tokens(token_ids_T)
        return embedded

    def run(self, token_ids_T: torch.Tensor, paged_pass: PagedPass) -> torch.Tensor:
        """Normalised hidden states ``[T, H]`` of int64 token ids ``[T]``."""
        assert isinstance(paged_pass, HybridPass)
        hidden: torch.Tensor = self.model(
            token_ids_T,
            self.rotary(paged_pass.positions),
            paged_pass.attend,
            paged_pass.recur,
            paged_pass.dispatch_mode,
        )
        return hidden

    def logits(self, hidden_TH: torch.Tensor) -> torch.Tensor:
        """float32 ``[T, vocab]`` of normalised hidden states."""
        head = self.model.embed_tokens if self.lm_head is None else self.lm_head
        return F.linear(hidden_TH, head.weight).float()


def _delta_net(
    config: Qwen3NextConfig, index: int, name: str, context: LayerContext
) -> GatedDeltaNet:
    return GatedDeltaNet(
        config.place(index),
        context,
        name,
        hidden_size=config.hidden_size,
        shape=config.qkv_shape(),
        conv_kernel_size=config.linear_conv_kernel_dim,
        rms_norm_eps=config.rms_norm_eps,
    )


def _attention(
    config: Qwen3NextConfig, index: int, name: str, context: LayerContext
) -> GroupedQueryAttention:
    return GroupedQueryAttention(
        config.place(index),
        config.attention_shape(),
        context,
        name,
        qk_norm=lambda size: ZeroCentredRMSNorm(size, config.rms_norm_eps),
    )


def _moe(config: Qwen3NextConfig, name: str, context: LayerContext) -> MoELayer:
    return MoELayer(
        context,
        name,
        router=SoftmaxRouter(
            hidden_size=config.hidden_size,
            num_experts=config.num_experts,
            num_experts_per_tok=config.num_experts_per_tok,
            norm_topk_prob=config.norm_topk_prob,
        ),
        experts=RoutedExperts(
            context,
            f"{name}.experts",
            config.num_experts,
            config.hidden_size,
            config.moe_intermediate_size,
        ),
        shared_experts=GatedSharedExpert(
            context, name, config.hidden_size, config.shared_expert_intermediate_size
        ),
    )
