"""Which tensor of a published checkpoint fills which part of which parameter."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mortise.checkpoint.placement import Placement
from mortise.layers.linear import projection_placements
from mortise.models.decoder_weights import decoder_placements, layer_placements

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mortise.models.deepseek_v32.model import DeepseekV32ForCausalLM
    from mortise.models.deepseek_v32.mtp import DeepseekV32MTP


def placements(model: DeepseekV32ForCausalLM) -> Iterator[Placement]:
    """Every tensor of the main model, under the hub's names."""
    return decoder_placements(model.model, model.lm_head, model.context.schemes)


def mtp_placements(mtp: DeepseekV32MTP, index: int) -> Iterator[Placement]:
    """Every tensor of a multi-token prediction layer; embedding and head are the main model's."""
    prefix = f"model.layers.{index}"
    yield Placement(f"{prefix}.enorm.weight", mtp.enorm.weight)
    yield Placement(f"{prefix}.hnorm.weight", mtp.hnorm.weight)
    yield from projection_placements(mtp.schemes, [f"{prefix}.eh_proj"], mtp.eh_proj)
    yield Placement(f"{prefix}.shared_head.norm.weight", mtp.norm.weight)
    yield from layer_placements(prefix, mtp.layer, mtp.schemes)
