"""Which tensor of a published checkpoint fills which part of the parts that decoders share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from mortise.checkpoint.placement import Placement, Skip
from mortise.layers.gated_delta_net import GatedRMSNorm
from mortise.layers.linear import Projection, projection_placements
from mortise.layers.moe import MoELayer
from mortise.layers.norm import RMSNorm, ZeroCentredRMSNorm
from mortise.layers.router import GroupedSigmoidRouter

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mortise.checkpoint.quantization.module_scheme import SchemeLookup
    from mortise.layers.mlp import SwiGLU
    from mortise.models.decoder import Decoder, DecoderLayer
    from mortise.models.decoder_config import RoutedDecoderConfig
    from mortise.parallel.group import ExpertParallelGroup


def decoder_placements(
    decoder: Decoder, lm_head: nn.Linear | None, schemes: SchemeLookup
) -> Iterator[Placement]:
    """Every tensor of a whole model, under the hub's names."""
    yield Placement("model.embed_tokens.weight", decoder.embed_tokens.weight)
    for index, layer in enumerate(decoder.layers):
        yield from layer_placements(f"model.layers.{index}", layer, schemes)  # type: ignore[arg-type]
    yield Placement("model.norm.weight", decoder.norm.weight)
    if lm_head is not None:
        yield Placement("lm_head.weight", lm_head.weight)


def layer_placements(
    prefix: str, layer: DecoderLayer, schemes: SchemeLookup
) -> Iterator[Placement]:
    """One decoder layer."""
    for name in ("input_layernorm", "post_attention_layernorm"):
        yield Placement(f"{prefix}.{name}.weight", getattr(layer, name).weight)
    yield from named_placements(f"{prefix}.self_attn", layer.self_attn, schemes)
    yield from feed_forward_placements(f"{prefix}.mlp", layer.mlp)


def named_placements(prefix: str, block: nn.Module, schemes: SchemeLookup) -> Iterator[Placement]:
    """The projections and norms of a block whose names are the checkpoint's own."""
    for name, module in block.named_modules():
        own = f"{prefix}.{name}"
        if isinstance(module, Projection):
            yield from projection_placements(schemes, [own], module)
        elif isinstance(module, RMSNorm | ZeroCentredRMSNorm | GatedRMSNorm | nn.LayerNorm):
            for part, parameter in module.named_parameters():
                yield Placement(f"{own}.{part}", parameter)


def feed_forward_placements(prefix: str, block: SwiGLU | MoELayer) -> Iterator[Placement]:
    """A dense block, or router, routed experts and shared experts."""
    if not isinstance(block, MoELayer):
        yield from block.placements()
        return
    yield Placement(f"{prefix}.gate.weight", block.gate.weight)
    if isinstance(block.gate, GroupedSigmoidRouter):
        bias = block.gate.e_score_correction_bias
        yield Placement(f"{prefix}.gate.e_score_correction_bias", bias)
    yield from block.experts.placements()
    if block.shared_experts is not None:
        yield from block.shared_experts.placements()


def decoder_skips(config: RoutedDecoderConfig, group: ExpertParallelGroup) -> tuple[Skip, ...]:
    """Tensors that a checkpoint may hold and the main model on this rank does not need."""
    first, count = config.num_hidden_layers, config.num_nextn_predict_layers
    declared = [
        Skip(
            rf"model\.layers\.{index}\..*",
            "multi-token prediction layer, read when drafting",
        )
        for index in range(first, first + count)
    ]
    declared += layer_skips(config, group)
    if config.tie_word_embeddings:
        declared.append(Skip(r"lm_head\.weight", "tied to the embedding"))
    return tuple(declared)


def layer_skips(config: RoutedDecoderConfig, group: ExpertParallelGroup) -> tuple[Skip, ...]:
    """Tensors that a checkpoint may hold in any layer and this rank does not need."""
    inv_freq = Skip(
        r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", "computed from the configuration"
    )
    if group.world_size == 1:
        return (inv_freq,)
    own = group.share(config.n_routed_experts)
    others = "|".join(str(one) for one in range(config.n_routed_experts) if one not in own)
    experts = rf"model\.layers\.\d+\.mlp\.experts\.(?:{others})\..*"
    return (inv_freq, Skip(experts, "experts of other ranks"))
