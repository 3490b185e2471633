"""One layer of the decoder, of the model itself or of its multi-token prediction."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from mortise.layers.gated_delta_net import GatedDeltaNet, Recur
from mortise.layers.grouped_attention import GroupedAttend, GroupedQueryAttention
from mortise.layers.mlp import SwiGLU
from mortise.layers.moe import MoELayer, RoutedExperts
from mortise.layers.norm import ZeroCentredRMSNorm
from mortise.layers.router import SoftmaxRouter
from mortise.layers.shared_expert import GatedSharedExpert
from mortise.spec.dispatch import DispatchMode

if TYPE_CHECKING:
    import torch

    from mortise.checkpoint.quantization.module_scheme import SchemeLookup
    from mortise.layers.context import LayerContext
    from mortise.layers.rotary import Rotation
    from mortise.models.qwen3_next.config import Qwen3NextConfig


class DecoderLayer(nn.Module):
    """A gated delta net or attention, then experts, each behind a norm and beside a residual.

    Args:
        config: sizes.
        mixer: what lets a token know of those before it.
        mlp: the block behind it.
        schemes: how the checkpoint stores each module.
    """

    def __init__(
        self,
        config: Qwen3NextConfig,
        mixer: GatedDeltaNet | GroupedQueryAttention,
        mlp: SwiGLU | MoELayer,
        schemes: SchemeLookup,
    ) -> None:
        super().__init__()
        self.schemes = schemes
        self.linear_attn = mixer if isinstance(mixer, GatedDeltaNet) else None
        self.self_attn = mixer if isinstance(mixer, GroupedQueryAttention) else None
        self.mlp = mlp
        self.input_layernorm = ZeroCentredRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = ZeroCentredRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        hidden_TH: torch.Tensor,
        rotation: Rotation,
        attend: GroupedAttend,
        recur: Recur | None,
        mode: DispatchMode = DispatchMode.NORMAL,
    ) -> torch.Tensor:
        """``[T, H]`` to ``[T, H]``.

        Args:
            hidden_TH: rows.
            rotation: of their positions.
            attend: how an attention's queries meet keys.
            recur: how a gated delta net meets its states; None for a layer that is none.
            mode: how tokens travel to their experts.
        """
        normalised_TH = self.input_layernorm(hidden_TH)
        if self.linear_attn is not None:
            assert recur is not None
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


def decoder_layer(config: Qwen3NextConfig, index: int, context: LayerContext) -> DecoderLayer:
    """The layer of one place in the checkpoint's numbering, of the kind the configuration says."""
    name = f"{config.decoder_name}.layers.{index}"
    mixer: GatedDeltaNet | GroupedQueryAttention
    if config.is_recurrent(index):
        mixer = _delta_net(config, index, f"{name}.linear_attn", context)
    else:
        mixer = _attention(config, config.place(index), f"{name}.self_attn", context)
    mlp: SwiGLU | MoELayer
    if config.is_dense(index):
        mlp = SwiGLU(context, f"{name}.mlp", config.hidden_size, config.intermediate_size)
    else:
        mlp = _moe(config, f"{name}.mlp", context)
    return DecoderLayer(config, mixer, mlp, context.schemes)


def draft_layer(config: Qwen3NextConfig, name: str, context: LayerContext) -> DecoderLayer:
    """Attention and experts, in a cache of their own, whatever the model's layers are."""
    return DecoderLayer(
        config,
        _attention(config, 0, f"{name}.self_attn", context),
        _moe(config, f"{name}.mlp", context),
        context.schemes,
    )


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
    config: Qwen3NextConfig, place: int, name: str, context: LayerContext
) -> GroupedQueryAttention:
    return GroupedQueryAttention(
        place,
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
