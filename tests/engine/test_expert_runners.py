"""What the backend says of its runner is a decision that `mortise explain` shows."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from mortise import LLM
from mortise.engine.expert_runners import runner_decisions
from mortise.layers.moe import MoELayer
from mortise.spec.capabilities import Support
from mortise.spec.methods import ordinary_method
from mortise.spec.roles import ModelRole

if TYPE_CHECKING:
    from pathlib import Path

    from mortise.spec.capabilities import ExpertLayerRequest


def test_layers_of_which_the_same_was_said_are_one_decision(tiny_model: Path) -> None:
    llm = LLM(model=tiny_model)
    model = llm.loaded.model
    layers = [module for module in model.modules() if isinstance(module, MoELayer)]
    assert len(layers) > 1
    assert not [one for one in llm.decisions if one.subject == "experts"], "it said nothing"

    def supports(request: ExpertLayerRequest) -> Support:
        method = ordinary_method(request.scheme_w13, request.compute_dtype)
        runner = "swift" if request.layer == layers[0].name else "keen (asked for)"
        return Support(ok=True, method=replace(method, runner=runner))

    for layer in layers:
        layer.context = replace(layer.context, ops=replace(layer.context.ops, supports=supports))
        layer.finish_loading(torch.float32)
    first, second = runner_decisions(ModelRole.MAIN, model)
    assert (first.subject, first.rule, first.value) == ("experts", "runner", "1 layers by swift")
    assert second.value == f"{len(layers) - 1} layers by keen (asked for)"
