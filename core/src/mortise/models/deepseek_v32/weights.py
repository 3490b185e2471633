"""Which tensor of a published checkpoint fills which part of which parameter."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mortise.checkpoint.placement import Placement, Skip
from mortise.layers.mlp import SwiGLU
from mortise.layers.moe import MoELayer

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from torch import nn

    from mortise.models.deepseek_v32.config import DeepseekV32Config
    from mortise.models.deepseek_v32.model import DecoderLayer, DeepseekV32ForCausalLM
    from mortise.models.deepseek_v32.mtp import DeepseekV32MTP


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
    yield Placement(f"{prefix}.eh_proj.weight", mtp.eh_proj.weight)
    yield Placement(f"{prefix}.shared_head.norm.weight", mtp.norm.weight)
    yield from layer_placements(prefix, mtp.layer)


def skips(config: DeepseekV32Config) -> tuple[Skip, ...]:
    """Tensors that a checkpoint may hold and the main model does not need."""
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
    if config.tie_word_embeddings:
        declared.append(Skip(r"lm_head\.weight", "tied to the embedding"))
    return tuple(declared)


def layer_placements(prefix: str, layer: DecoderLayer) -> Iterator[Placement]:
    """One decoder layer."""
    for name in ("input_layernorm", "post_attention_layernorm"):
        yield Placement(f"{prefix}.{name}.weight", getattr(layer, name).weight)
    # Module and tensor names of attention are the checkpoint's own.
    for name, parameter in layer.self_attn.named_parameters():
        yield Placement(f"{prefix}.self_attn.{name}", parameter)
    if isinstance(layer.mlp, MoELayer):
        yield from _moe_placements(f"{prefix}.mlp", layer.mlp)
    else:
        yield from _swiglu_placements(f"{prefix}.mlp", layer.mlp)


def _moe_placements(prefix: str, moe: MoELayer) -> Iterator[Placement]:
    yield Placement(f"{prefix}.gate.weight", moe.gate.weight)
    yield Placement(f"{prefix}.gate.e_score_correction_bias", moe.gate.e_score_correction_bias)
    experts = moe.experts
    for expert in range(experts.w13.shape[0]):
        own = f"{prefix}.experts.{expert}"
        yield from _gate_up(own, experts.w13[expert])
        yield Placement(f"{own}.down_proj.weight", experts.w2[expert])
    if moe.shared_experts is not None:
        yield from _swiglu_placements(f"{prefix}.shared_experts", moe.shared_experts)


def _swiglu_placements(prefix: str, block: SwiGLU | nn.Module) -> Iterator[Placement]:
    assert isinstance(block, SwiGLU)
    yield from _gate_up(prefix, block.gate_up_proj.weight)
    yield Placement(f"{prefix}.down_proj.weight", block.down_proj.weight)


def _gate_up(prefix: str, fused: torch.Tensor) -> Iterator[Placement]:
    gate, up = fused.chunk(2, dim=0)
    yield Placement(f"{prefix}.gate_proj.weight", gate)
    yield Placement(f"{prefix}.up_proj.weight", up)
