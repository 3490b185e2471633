"""Which modules are quantised, and which of them have to agree."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.fixtures.quantised_models import save_odd
from tests.fixtures.tiny_models import save_tiny

from mortise.checkpoint import CheckpointTensors, ModelDirectory
from mortise.checkpoint.quantization.write.projections import Projection, select_projections
from mortise.checkpoint.quantization.write.recipe import Recipe, Rule
from mortise.errors import QuantizationConfigError

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_odd(tmp_path_factory.mktemp("models") / "odd")


def select(model: Path, recipe: Recipe) -> dict[str, Projection]:
    directory = ModelDirectory.open(model)
    with CheckpointTensors(directory.weight_files()) as tensors:
        found = select_projections(tensors, directory.config, recipe)
    return {projection.module: projection for projection in found}


def test_projections_of_the_decoder_layers_are_quantised_and_nothing_else(model: Path) -> None:
    found = select(model, Recipe.of("w8a8"))
    assert {one.kind for one in found.values() if one.is_quantised} == {
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
        "mlp.experts.*.gate_proj",
        "mlp.experts.*.up_proj",
        "mlp.experts.*.down_proj",
        "mlp.shared_experts.gate_proj",
        "mlp.shared_experts.up_proj",
        "mlp.shared_experts.down_proj",
        "self_attn.q_a_proj",
        "self_attn.q_b_proj",
        "self_attn.kv_a_proj_with_mqa",
        "self_attn.kv_b_proj",
        "self_attn.o_proj",
        "self_attn.indexer.wq_b",
        "self_attn.indexer.wk",
    }
    left = {name: one.scheme.reason for name, one in found.items() if not one.is_quantised}
    further = {name for name in left if name.startswith("model.layers.2.")}
    assert len(further) == 25
    assert {left[name] for name in further} == {"multi-token prediction layer"}
    assert {name: reason for name, reason in left.items() if name not in further} == {
        "lm_head": "outside the decoder layers",
        "model.layers.1.mlp.gate": "router",
        "model.layers.0.self_attn.indexer.weights_proj": "weights of the indexer's heads,"
        " computed in float32",
        "model.layers.1.self_attn.indexer.weights_proj": "weights of the indexer's heads,"
        " computed in float32",
    }


def test_a_tied_head_is_named_though_it_has_no_tensor(tmp_path: Path) -> None:
    tied = save_odd(tmp_path / "tied", tie_word_embeddings=True)
    assert select(tied, Recipe.of("w8a8"))["lm_head"].scheme.reason == "tied to the embedding"


@pytest.mark.parametrize(
    ("recipe", "what"),
    [
        (
            Recipe.of("w8a8", ignore=["*.down_projection"]),
            "--ignore *.down_projection matches no projection that can be quantised",
        ),
        (
            Recipe.of("w8a8", rules=[Rule("lm_head", "float")]),
            "--scheme-for lm_head=float matches no projection that can be quantised",
        ),
        (
            Recipe.of("w8a8", rules=[Rule("*", "float")]),
            "no projection would be quantised",
        ),
    ],
)
def test_recipes_that_miss_the_model(model: Path, recipe: Recipe, what: str) -> None:
    with pytest.raises(QuantizationConfigError) as caught:
        select(model, recipe)
    assert caught.value.what == what
    assert caught.value.details


def test_the_closest_name_is_shown(model: Path) -> None:
    with pytest.raises(QuantizationConfigError) as caught:
        select(model, Recipe.of("w8a8", ignore=["model.layers.0.mlp.down_projection"]))
    assert caught.value.details == ("closest: model.layers.0.mlp.down_proj",)


@pytest.mark.parametrize(
    ("pattern", "one", "other"),
    [
        ("*.layers.0.mlp.gate_proj", "layers.0.mlp.gate_proj", "layers.0.mlp.up_proj"),
        ("*.shared_experts.up_proj", "shared_experts.gate_proj", "shared_experts.up_proj"),
        ("*.experts.3.down_proj", "experts.0.down_proj", "experts.3.down_proj"),
        ("*.experts.2.*", ".experts.0.", ".experts.2."),
        ("*.experts.*.gate_proj", "experts.0.gate_proj", "experts.0.up_proj"),
    ],
)
def test_one_product_has_one_scheme(model: Path, pattern: str, one: str, other: str) -> None:
    with pytest.raises(QuantizationConfigError) as caught:
        select(model, Recipe.of("w8a8", ignore=[pattern]))
    for name in (one, other):
        assert name in caught.value.what
    assert any(f"float (--ignore {pattern})" in detail for detail in caught.value.details)


def test_the_two_products_of_the_experts_may_differ(model: Path) -> None:
    found = select(model, Recipe.of("w4a16", rules=[Rule("*.experts.*.down_proj", "w8a8")]))
    assert found["model.layers.1.mlp.experts.3.down_proj"].scheme.scheme.value == "w8a8"
    assert found["model.layers.1.mlp.experts.3.up_proj"].scheme.scheme.value == "w4a16"


@pytest.mark.parametrize("model_type", ["qwen3_next", "qwen3_5_moe_text"])
def test_gates_of_a_delta_net_and_what_drafts_stay_as_they_are(
    tmp_path: Path, model_type: str
) -> None:
    path = save_tiny(tmp_path, model_type=model_type, tokenizer=False)
    tensors = load_file(path / "model.safetensors")
    tensors["mtp.layers.0.self_attn.q_proj.weight"] = torch.ones(16, 16)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    found = select(path, Recipe.of("fp8-block"))
    quantised = {one.kind for one in found.values() if one.is_quantised}
    is_next = model_type == "qwen3_next"
    assert {kind for kind in quantised if kind.startswith("linear_attn.in_proj")} == (
        {"linear_attn.in_proj_qkvz"}
        if is_next
        else {"linear_attn.in_proj_qkv", "linear_attn.in_proj_z"}
    )
    assert {"linear_attn.out_proj", "self_attn.q_proj", "mlp.shared_expert.up_proj"} <= quantised
    assert found["mtp.layers.0.self_attn.q_proj"].scheme.reason == "multi-token prediction layer"
    left = {one.scheme.reason for one in found.values() if not one.is_quantised}
    assert left == {
        "outside the decoder layers",
        "router",
        "gate of the shared expert",
        "gates of the delta net",
        "multi-token prediction layer",
    }
