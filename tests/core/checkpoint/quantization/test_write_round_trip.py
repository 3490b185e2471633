"""The core reads what it wrote: the same schemes, and bit for bit the same weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from tests.fixtures.quantised_models import save_odd, stored_weights, write

from mortise.checkpoint import CheckpointTensors, ModelDirectory, load_weights
from mortise.checkpoint.placement import Skip
from mortise.checkpoint.quantization.plan import QuantizationPlan
from mortise.checkpoint.quantization.write.recipe import Recipe, Rule
from mortise.layers.stored_tensors import StoredTensors

if TYPE_CHECKING:
    from pathlib import Path

RECIPES = {
    "fp8": Recipe.of("fp8-block"),
    "fp8 ue8m0": Recipe.of("fp8-block", powers_of_two=True, ignore=["*.kv_b_proj"]),
    "compressed-tensors w8a8": Recipe.of("w8a8"),
    "compressed-tensors w4a8": Recipe.of("w4a8", group_size=40),
    "compressed-tensors w4a16": Recipe.of("w4a16"),
    "compressed-tensors nvfp4": Recipe.of("nvfp4"),
    "compressed-tensors mixed": Recipe.of(
        "w4a16",
        rules=[
            Rule("*.experts.*.down_proj", "nvfp4"),
            Rule("*.experts.*", "w8a8"),
            Rule("*.layers.0.self_attn.*", "w4a8"),
            Rule("*.layers.1.self_attn.q_a_proj", "float"),
        ],
    ),
    "modelopt nvfp4": Recipe.of("nvfp4", "modelopt"),
    "modelslim w8a8": Recipe.of("w8a8", "modelslim"),
    "modelslim w4a8": Recipe.of("w4a8", "modelslim"),
    "modelslim w4a4": Recipe.of("w4a4", group_size=40),
    "modelslim mixed": Recipe.of(
        "w8a8-static", rules=[Rule("*.experts.*.down_proj", "w8a8"), Rule("*.experts.*", "w4a4")]
    ),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_odd(tmp_path_factory.mktemp("models") / "odd", tokenizer=False)


@pytest.mark.parametrize("name", RECIPES)
def test_round_trip(model: Path, tmp_path: Path, name: str) -> None:
    projections = write(model, tmp_path / "q", RECIPES[name])
    directory = ModelDirectory.open(tmp_path / "q")
    with CheckpointTensors(directory.weight_files()) as tensors:
        plan = QuantizationPlan.read(directory, tensors)
        plan.check_names([])
        memory, placements = {}, []
        for module, projection in projections.items():
            found = plan.scheme(module)
            wanted = projection.scheme
            assert found.scheme is wanted.scheme, module
            if not projection.is_quantised:
                continue
            assert found.static_input == wanted.static_input
            assert found.scale_format is wanted.scale_format
            assert found.num_groups(projection.in_features) == wanted.num_groups(
                projection.in_features
            )
            memory[module] = StoredTensors(
                found, projection.out_features, projection.in_features, module=module
            )
            placements += plan.placements(module, memory[module].part(0), found)
        rest = Skip(".+", "not quantised, or of no use")
        load_weights(tensors, placements, (*plan.skips(), rest))
    for module, expected in stored_weights(model, projections).items():
        found = memory[module].record()
        assert torch.equal(found.weight.view(torch.uint8), expected.weight.view(torch.uint8))
        for field in ("scale", "global_scale", "input_scale", "input_offset"):
            one, other = getattr(found, field), getattr(expected, field)
            assert (one is None) == (other is None), (module, field)
            if one is not None:
                # Divisors and products with the input's scale are rounded on their way.
                torch.testing.assert_close(one.float(), other.float(), rtol=3e-7, atol=0)
