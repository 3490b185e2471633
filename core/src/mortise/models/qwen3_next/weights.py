"""Which tensor of a published checkpoint fills which part of which parameter."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from mortise.checkpoint.placement import Placement, Skip
from mortise.layers.linear import projection_placements
from mortise.models.decoder_weights import feed_forward_placements, named_placements
from mortise.models.qwen3_next.mtp import DRAFT_LAYER, DRAFT_PROJECTION
from mortise.models.shared_tensors import same_as_main

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mortise.checkpoint.quantization.module_scheme import SchemeLookup
    from mortise.layers.gated_delta_net import GatedDeltaNet
    from mortise.models.qwen3_next.config import Qwen3NextConfig
    from mortise.models.qwen3_next.layer import DecoderLayer
    from mortise.models.qwen3_next.model import Qwen3NextForCausalLM
    from mortise.models.qwen3_next.mtp import Qwen3NextDraft
    from mortise.parallel.group import ExpertParallelGroup


def placements(model: Qwen3NextForCausalLM) -> Iterator[Placement]:
    """Every tensor of the main model, under the hub's names."""
    name, decoder = model.config.decoder_name, model.model
    yield Placement(f"{name}.embed_tokens.weight", decoder.embed_tokens.weight)
    for index, layer in enumerate(decoder.layers):
        yield from layer_placements(f"{name}.layers.{index}", layer)  # type: ignore[arg-type]
    yield Placement(f"{name}.norm.weight", decoder.norm.weight)
    if model.lm_head is not None:
        yield Placement("lm_head.weight", model.lm_head.weight)


def skips(config: Qwen3NextConfig, group: ExpertParallelGroup) -> tuple[Skip, ...]:
    """Tensors that a checkpoint may hold and the main model on this rank does not need."""
    layers = rf"{re.escape(config.decoder_name)}\.layers\.\d+"
    declared = [
        Skip(r"mtp\..*", "multi-token prediction layer, read when drafting"),
        Skip(rf"{layers}\.self_attn\.rotary_emb\.inv_freq", "computed from the configuration"),
    ]
    if config.model_type == "qwen3_5_moe":
        declared.append(Skip(r"model\.visual\..*", "sees pictures; texts alone are read"))
    if group.world_size > 1:
        declared.append(_experts_of_others(layers, config, group))
    if config.tie_word_embeddings:
        declared.append(Skip(r"lm_head\.weight", "tied to the embedding"))
    return tuple(declared)


def draft_placements(draft: Qwen3NextDraft, main: Qwen3NextForCausalLM) -> Iterator[Placement]:
    """Every tensor of the multi-token prediction layer, under the hub's names."""
    yield from projection_placements(draft.context.schemes, [DRAFT_PROJECTION], draft.fc)
    for name in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm"):
        yield Placement(f"mtp.{name}.weight", getattr(draft, name).weight)
    yield from layer_placements(DRAFT_LAYER, draft.layer)
    embedding = main.model.embed_tokens.weight
    head = embedding if main.lm_head is None else main.lm_head.weight
    yield same_as_main("mtp.embed_tokens.weight", embedding, "embedding")
    yield same_as_main("mtp.lm_head.weight", head, "head")


def draft_skips(config: Qwen3NextConfig, group: ExpertParallelGroup) -> tuple[Skip, ...]:
    """Tensors that a checkpoint may hold and its draft on this rank does not need."""
    layer = re.escape(DRAFT_LAYER)
    declared = [
        Skip(r"(?!mtp\.).*", "the main model's"),
        Skip(
            rf"(?!{layer}\.)mtp\.layers\.\d+\..*",
            "only the first multi-token prediction layer drafts",
        ),
        Skip(rf"{layer}\.self_attn\.rotary_emb\.inv_freq", "computed from the configuration"),
    ]
    if group.world_size > 1:
        declared.append(_experts_of_others(layer, config, group))
    return tuple(declared)


def layer_placements(prefix: str, layer: DecoderLayer) -> Iterator[Placement]:
    """One decoder layer."""
    for name in ("input_layernorm", "post_attention_layernorm"):
        yield Placement(f"{prefix}.{name}.weight", getattr(layer, name).weight)
    if layer.linear_attn is not None:
        yield from _delta_net_placements(f"{prefix}.linear_attn", layer.linear_attn, layer.schemes)
    if layer.self_attn is not None:
        yield from named_placements(f"{prefix}.self_attn", layer.self_attn, layer.schemes)
    yield from feed_forward_placements(f"{prefix}.mlp", layer.mlp)


def _delta_net_placements(
    prefix: str, net: GatedDeltaNet, schemes: SchemeLookup
) -> Iterator[Placement]:
    yield Placement(f"{prefix}.A_log", net.A_log)
    yield Placement(f"{prefix}.dt_bias", net.dt_bias)
    yield Placement(f"{prefix}.conv1d.weight", net.conv1d.weight)
    yield from named_placements(prefix, net, schemes)


def _experts_of_others(layers: str, config: Qwen3NextConfig, group: ExpertParallelGroup) -> Skip:
    own = "|".join(map(str, group.share(config.num_experts)))
    return Skip(rf"{layers}\.mlp\.experts\.(?!(?:{own})\.)\d+\..*", "experts of other ranks")
