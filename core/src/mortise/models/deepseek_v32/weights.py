"""Which tensor of a published checkpoint fills which part of which parameter."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from mortise.checkpoint.placement import Placement, Skip
from mortise.layers.linear import Projection, projection_placements
from mortise.layers.moe import MoELayer
from mortise.layers.norm import RMSNorm
from mortise.layers.router import GroupedSigmoidRouter

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mortise.checkpoint.quantization.module_scheme import SchemeLookup
    from mortise.layers.mla import MLAttention
    from mortise.models.deepseek_v32.config import LatentMoEConfig
    from mortise.models.deepseek_v32.model import DecoderLayer, DeepseekV32ForCausalLM
    from mortise.models.deepseek_v32.mtp import DeepseekV32MTP
    from mortise.parallel.group import ExpertParallelGroup


def placements(model: DeepseekV32ForCausalLM) -> Iterator[Placement]:
    """Every tensor of the main model, under the hub's names."""
    yield Placement("model.embed_tokens.weight", model.model.embed_tokens.weight)
    for index, layer in enumerate(model.model.layers):
        yield from layer_placements(f"model.layers.{index}", layer)  # type: ignore[arg-type]
    yield Placement("model.norm.weight", model.model.norm.weight)
    if model.lm_head is not None:
        yield Placement("lm_head.weight", model.lm_head.weight)


def mtp_placements(mtp: DeepseekV32MTP, index: int) -> Iterator[Placement]:
    """Every tensor of a multi-token prediction layer; embedding and head are the main model's."""
    prefix = f"model.layers.{index}"
    yield Placement(f"{prefix}.enorm.weight", mtp.enorm.weight)
    yield Placement(f"{prefix}.hnorm.weight", mtp.hnorm.weight)
    yield from projection_placements(mtp.layer.schemes, [f"{prefix}.eh_proj"], mtp.eh_proj)
    yield Placement(f"{prefix}.shared_head.norm.weight", mtp.norm.weight)
    yield from layer_placements(prefix, mtp.layer)


def skips(config: LatentMoEConfig, group: ExpertParallelGroup) -> tuple[Skip, ...]:
    """Tensors that a checkpoint may hold and the main model on this rank does not need."""
    first, count = config.num_hidden_layers, config.num_nextn_predict_layers
    declared = [
        Skip(
            rf"model\.layers\.{index}\..*",
            "multi-token prediction layer, read when drafting",
        )
        for index in range(first, first + count)
    ]
    declared.append(
        Skip(
            r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
            "computed from the configuration",
        )
    )
    if group.world_size > 1:
        own = "|".join(map(str, group.share(config.n_routed_experts)))
        declared.append(
            Skip(rf"model\.layers\.\d+\.mlp\.experts\.(?!(?:{own})\.).*", "experts of other ranks")
        )
    if config.tie_word_embeddings:
        declared.append(Skip(r"lm_head\.weight", "tied to the embedding"))
    return tuple(declared)


def layer_placements(prefix: str, layer: DecoderLayer) -> Iterator[Placement]:
    """One decoder layer."""
    for name in ("input_layernorm", "post_attention_layernorm"):
        yield Placement(f"{prefix}.{name}.weight", getattr(layer, name).weight)
    yield from _attention_placements(f"{prefix}.self_attn", layer.self_attn, layer.schemes)
    if isinstance(layer.mlp, MoELayer):
        yield from _moe_placements(f"{prefix}.mlp", layer.mlp)
    else:
        yield from layer.mlp.placements()


def _attention_placements(
    prefix: str, attention: MLAttention, schemes: SchemeLookup
) -> Iterator[Placement]:
    # Module and tensor names of attention are the checkpoint's own.
    for name, module in attention.named_modules():
        own = f"{prefix}.{name}"
        if isinstance(module, Projection):
            yield from projection_placements(schemes, [own], module)
        elif isinstance(module, RMSNorm | nn.LayerNorm):
            for part, parameter in module.named_parameters():
                yield Placement(f"{own}.{part}", parameter)


def _moe_placements(prefix: str, moe: MoELayer) -> Iterator[Placement]:
    assert isinstance(moe.gate, GroupedSigmoidRouter)
    yield Placement(f"{prefix}.gate.weight", moe.gate.weight)
    yield Placement(f"{prefix}.gate.e_score_correction_bias", moe.gate.e_score_correction_bias)
    yield from moe.experts.placements()
    if moe.shared_experts is not None:
        yield from moe.shared_experts.placements()
