"""The parts that decoders have in common, whatever their attention is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from mortise.layers.mlp import SwiGLU
from mortise.layers.moe import MoELayer, RoutedExperts
from mortise.layers.norm import RMSNorm
from mortise.layers.router import GroupedSigmoidRouter
from mortise.spec.dispatch import DispatchMode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from mortise.layers.context import LayerContext
    from mortise.layers.rotary import Rotation
    from mortise.models.decoder_config import RoutedDecoderConfig


class DecoderLayer(nn.Module):
    """Attention, then a dense block or experts, each behind a norm and beside a residual.

    Args:
        config: sizes.
        self_attn: takes ``[T, H]``, the rotation and how to attend.
        mlp: the block behind it.
    """

    def __init__(
        self, config: RoutedDecoderConfig, self_attn: nn.Module, mlp: SwiGLU | MoELayer
    ) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = self_attn
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = mlp

    def forward(
        self,
        hidden_TH: torch.Tensor,
        rotation: Rotation,
        attend: Callable[..., torch.Tensor],
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


class Decoder(nn.Module):
    """Embedding, layers and final norm.

    Args:
        config: sizes.
        layers: in their order.
    """

    def __init__(self, config: RoutedDecoderConfig, layers: Iterable[DecoderLayer]) -> None:
        super().__init__()
        size = (config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding(*size, _weight=torch.empty(*size))
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        token_ids_T: torch.Tensor,
        rotation: Rotation,
        attend: Callable[..., torch.Tensor],
        mode: DispatchMode = DispatchMode.NORMAL,
    ) -> torch.Tensor:
        """Token ids int64 ``[T]`` to normalised hidden states ``[T, H]``."""
        hidden_TH = self.embed_tokens(token_ids_T)
        for layer in self.layers:
            hidden_TH = layer(hidden_TH, rotation, attend, mode)
        normalised: torch.Tensor = self.norm(hidden_TH)
        return normalised


def language_head(config: RoutedDecoderConfig) -> nn.Linear | None:
    """The projection to the vocabulary, or None where the embedding is used for it."""
    if config.tie_word_embeddings:
        return None
    return nn.Linear(config.hidden_size, config.vocab_size, bias=False)


def logits_of(hidden_TH: torch.Tensor, decoder: Decoder, lm_head: nn.Linear | None) -> torch.Tensor:
    """float32 ``[T, vocab]`` of normalised hidden states."""
    head = decoder.embed_tokens if lm_head is None else lm_head
    return F.linear(hidden_TH, head.weight).float()


def feed_forward(
    config: RoutedDecoderConfig, index: int, name: str, context: LayerContext
) -> SwiGLU | MoELayer:
    """The dense block or the experts of one layer."""
    if config.is_dense(index):
        return SwiGLU(context, name, config.hidden_size, config.intermediate_size)
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
