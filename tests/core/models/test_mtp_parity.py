"""The multi-token prediction layer computes what transformers' does, under the hub's names."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tests.fixtures.paged_models import CPU, reference_context
from tests.fixtures.tiny_models import YARN, tiny_transformers_model

from mortise.layers.paged_attention import BatchLayout
from mortise.models.registry import family_of
from mortise.spec.roles import ForwardMode

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mortise.checkpoint.load import Placement

NUM_TOKENS = 70
NUM_LAYERS = 2


def hub_tensors(model: torch.nn.Module, prefix: str = "") -> dict[str, torch.Tensor]:
    """Parameters in memory under the names of the hub, experts one by one."""
    tensors: dict[str, torch.Tensor] = {}
    for name, value in model.state_dict().items():
        if name.endswith("experts.gate_up_proj"):
            for expert, gate_up in enumerate(value):
                gate, up = gate_up.chunk(2)
                own = f"{prefix}{name.removesuffix('gate_up_proj')}{expert}"
                tensors[f"{own}.gate_proj.weight"], tensors[f"{own}.up_proj.weight"] = gate, up
        elif name.endswith("experts.down_proj"):
            for expert, down in enumerate(value):
                own = f"{prefix}{name.removesuffix('down_proj')}{expert}"
                tensors[f"{own}.down_proj.weight"] = down
        else:
            tensors[prefix + name] = value
    return tensors


def mtp_tensors(mtp: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What a checkpoint holds in the layer after the last, beside embedding and head."""
    tensors = hub_tensors(mtp.layers[0], f"model.layers.{NUM_LAYERS}.")
    return {
        re.sub(r"\.mtp_block\.", ".", name).replace(".post_norm.", ".shared_head.norm."): value
        for name, value in tensors.items()
    }


@torch.no_grad()
def fill(targets: Iterable[Placement], tensors: dict[str, torch.Tensor]) -> None:
    for placement in targets:
        if placement.optional and placement.name not in tensors:
            continue
        stored = tensors.pop(placement.name)
        assert stored.shape == placement.target.shape
        placement.target.copy_(stored)


@pytest.mark.parametrize(
    "overrides", [{}, {"rope_parameters": YARN, "n_group": 1, "topk_group": 1}]
)
@torch.inference_mode()
def test_logits_of_the_token_after_the_next(overrides: dict[str, Any]) -> None:
    from transformers.modeling_layers import MtpModel

    theirs = tiny_transformers_model(
        model_type="deepseek_v3",
        num_hidden_layers=NUM_LAYERS,
        num_nextn_predict_layers=1,
        **overrides,
    )
    with torch.random.fork_rng():
        torch.manual_seed(3)
        their_mtp = MtpModel(theirs, 1).eval()
        for parameter in their_mtp.layers.parameters():
            parameter.normal_(std=0.1) if parameter.dim() > 1 else parameter.normal_(1, 0.1)
    tokens = torch.randint(0, 256, (1, NUM_TOKENS), generator=torch.Generator().manual_seed(0))
    hidden = theirs.model(tokens).last_hidden_state[:, :-1]
    # The layer joins the state of a token with the embedding of the next, whose position it takes.
    drafted = their_mtp.forward_layer(
        0,
        hidden,
        position_ids=torch.arange(1, NUM_TOKENS).unsqueeze(0),
        mtp_cache=None,
        input_ids=tokens[:, 1:],
    )
    expected = theirs.lm_head(drafted)[0]

    raw = theirs.config.to_dict()
    family = family_of(raw)
    model = family.build(raw, reference_context())
    fill(family.placements(model), hub_tensors(theirs))
    model.finish_loading()
    draft = family.build_draft(raw, reference_context())
    tensors = mtp_tensors(their_mtp)
    fill(family.draft_placements(draft, model), tensors)
    assert not tensors, "every tensor of the layer has its place"
    draft.finish_loading()

    pool = draft.new_pool(4, torch.float32, CPU)
    length = NUM_TOKENS - 1
    layout = BatchLayout.build(ForwardMode.PREFILL, [length], [length], [[2, 1]], CPU)
    got = draft.run(model.embed(tokens[0, 1:]), hidden[0], draft.new_pass(pool, layout))
    assert expected.abs().max() > 0.5
    torch.testing.assert_close(model.logits(got), expected, atol=1e-4, rtol=0)
