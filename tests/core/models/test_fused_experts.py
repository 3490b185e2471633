"""Experts stored as one tensor a layer give the very weights that they give one by one."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.cli.command_line import mortise
from tests.fixtures.paged_models import reference_ops
from tests.fixtures.qwen_mtp import OurDraft, TheirDraft, one_by_one, save_with_draft, their_models
from tests.fixtures.tiny_models import tiny_transformers_model

from mortise.checkpoint import CheckpointTensors, ModelDirectory, load_weights
from mortise.checkpoint.quantization.plan import QuantizationPlan
from mortise.errors import MissingTensorError, TensorMismatchError, WeightsError
from mortise.formats.weights import dequantise_weight
from mortise.layers.context import LayerContext
from mortise.models.registry import family_of
from mortise.parallel.group import ExpertParallelGroup
from mortise.spec.weights import WeightScheme

if TYPE_CHECKING:
    from pathlib import Path

    from mortise.checkpoint import LoadReport

NEXT, MOE_TEXT = "qwen3_next", "qwen3_5_moe_text"
GATE_UP, DOWN = (f"model.layers.1.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj"))
NUM_EXPERTS = 6


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As transformers saves it: one by one."""
    path = tmp_path_factory.mktemp("apart")
    tiny_transformers_model(model_type=MOE_TEXT).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As transformers holds it, and as Qwen3.5 is published."""
    path = tmp_path_factory.mktemp("fused")
    tiny_transformers_model(model_type=MOE_TEXT).save_pretrained(path, save_original_format=False)
    return path


def loaded(
    path: Path, group: ExpertParallelGroup | None = None
) -> tuple[torch.nn.Module, LoadReport]:
    directory = ModelDirectory.open(path)
    tensors = CheckpointTensors(directory.weight_files())
    raw, family = directory.config, family_of(directory.config)
    group = group or ExpertParallelGroup()
    plan = QuantizationPlan.read(directory, tensors)
    model = family.build(raw, LayerContext(ops=reference_ops(), group=group, schemes=plan))
    report = load_weights(
        tensors, family.placements(model), (*family.skips(raw, group), *plan.skips())
    )
    assert isinstance(model, torch.nn.Module)
    return model, report


def with_tensors(source: Path, path: Path, changed: dict[str, torch.Tensor | None]) -> Path:
    """A copy with some tensors added or replaced, and those that are None left out."""
    tensors = {**load_file(source / "model.safetensors"), **changed}
    kept = {name: value.contiguous() for name, value in tensors.items() if value is not None}
    save_file(kept, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text((source / "config.json").read_text())
    return path


def assert_same_bits(one: torch.nn.Module, other: torch.nn.Module) -> None:
    there, here = dict(one.named_parameters()), dict(other.named_parameters())
    assert there.keys() == here.keys()
    for name, parameter in there.items():
        assert torch.equal(parameter, here[name]), name


@pytest.mark.parametrize("model_type", [NEXT, MOE_TEXT, "deepseek_v3", "glm4_moe"])
def test_what_transformers_holds_is_what_it_saves(model_type: str, tmp_path: Path) -> None:
    model = tiny_transformers_model(model_type=model_type)
    model.save_pretrained(tmp_path / "apart")
    model.save_pretrained(tmp_path / "fused", save_original_format=False)
    names = [set(load_file(tmp_path / form / "model.safetensors")) for form in ("apart", "fused")]
    assert GATE_UP.replace("gate_up_proj", "0.gate_proj.weight") in names[0]
    assert GATE_UP in names[1]
    (one, _), (other, report) = loaded(tmp_path / "apart"), loaded(tmp_path / "fused")
    assert_same_bits(one, other)
    # To whom loads it, the one is the other.
    assert set(report.placed) == names[0]
    assert not report.absent


def test_bfloat16(apart: Path, fused: Path, tmp_path: Path) -> None:
    for source, path in ((apart, tmp_path / "apart"), (fused, tmp_path / "fused")):
        path.mkdir()
        rounded = load_file(source / "model.safetensors")
        with_tensors(source, path, {name: one.bfloat16() for name, one in rounded.items()})
    assert_same_bits(loaded(tmp_path / "apart")[0], loaded(tmp_path / "fused")[0])


def test_either_projection_may_be_fused(apart: Path, fused: Path, tmp_path: Path) -> None:
    gate_up = load_file(fused / "model.safetensors")[GATE_UP]
    ones = [name for name in load_file(apart / "model.safetensors") if "1.mlp.experts" in name]
    changed: dict[str, Any] = {name: None for name in ones if "down" not in name}
    model, _ = loaded(with_tensors(apart, tmp_path, {**changed, GATE_UP: gate_up}))
    assert_same_bits(loaded(apart)[0], model)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_rank_takes_its_share(apart: Path, fused: Path, rank: int) -> None:
    group = ExpertParallelGroup(rank=rank, world_size=3)
    (one, its), (other, report) = loaded(apart, group), loaded(fused, group)
    assert_same_bits(one, other)
    assert report.skipped == its.skipped
    assert len(report.skipped) == 4 * 4 * 3
    assert report.bytes == its.bytes, "no more is read than the rank's share"
    whole, _ = loaded(fused)
    own = slice(2 * rank, 2 * rank + 2)
    for place in range(4):
        here, there = (model.model.layers[place].mlp.experts for model in (other, whole))
        assert torch.equal(here.w13.weight, there.w13.weight[own])
        assert torch.equal(here.w2.weight, there.w2.weight[own])


@pytest.mark.parametrize("number", [0, 2])
def test_an_expert_in_both_forms(fused: Path, tmp_path: Path, number: int) -> None:
    """Nothing says which of the two values is meant."""
    name = f"model.layers.1.mlp.experts.{number}.up_proj.weight"
    with pytest.raises(WeightsError) as caught:
        loaded(with_tensors(fused, tmp_path, {name: torch.ones(32, 64)}))
    message = str(caught.value)
    assert f"tensor {name!r} is stored twice" in message
    assert f"in {GATE_UP}, which holds it of all experts" in message


def test_a_fused_tensor_that_is_missing(fused: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingTensorError, match=r"lacks 6 tensors") as caught:
        loaded(with_tensors(fused, tmp_path, {DOWN: None}))
    assert "model.layers.1.mlp.experts.0.down_proj.weight" in str(caught.value)


def test_a_wrong_shape(fused: Path, tmp_path: Path) -> None:
    with pytest.raises(TensorMismatchError) as caught:
        loaded(with_tensors(fused, tmp_path, {GATE_UP: torch.ones(NUM_EXPERTS, 64, 60)}))
    wrong = "experts.0.gate_proj.weight is [32, 60] in model.safetensors, expected [32, 64]"
    assert wrong in str(caught.value)


@pytest.mark.parametrize("shape", [(NUM_EXPERTS, 63, 64), (NUM_EXPERTS * 64, 64)])
def test_a_tensor_that_is_no_experts(fused: Path, tmp_path: Path, shape: tuple[int, ...]) -> None:
    """Neither of rows that are gate and up, nor without experts."""
    with pytest.raises(MissingTensorError) as caught:
        loaded(with_tensors(fused, tmp_path, {GATE_UP: torch.ones(shape)}))
    assert "lacks 12 tensors" in str(caught.value)
    assert GATE_UP in str(caught.value).split("also:")[1]


def test_too_few_experts(fused: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingTensorError, match=r"experts\.5\.down_proj\.weight"):
        loaded(with_tensors(fused, tmp_path, {DOWN: torch.ones(5, 64, 32)}))


def test_quantised_experts_of_which_nothing_is_said(fused: Path, tmp_path: Path) -> None:
    values = load_file(fused / "model.safetensors")[GATE_UP].to(torch.float8_e4m3fn)
    with pytest.raises(
        TensorMismatchError, match=r"experts\.0\.gate_proj\.weight is float8_e4m3fn"
    ):
        loaded(with_tensors(fused, tmp_path, {GATE_UP: values}))


def test_float8_experts_and_their_scales_as_one_tensor_each(tmp_path: Path) -> None:
    """As transformers holds what it has quantised; the same bits one by one."""
    sizes = {"hidden_size": 128, "moe_intermediate_size": 128, "num_hidden_layers": 2}
    layers = ["linear_attention", "full_attention"]
    model = tiny_transformers_model(model_type=MOE_TEXT, layer_types=layers, **sizes)
    model.save_pretrained(tmp_path, save_original_format=False)
    tensors = load_file(tmp_path / "model.safetensors")
    changed: dict[str, torch.Tensor | None] = {}
    for name in [name for name in tensors if ".experts." in name]:
        rows = tensors[name].shape[1] // 128
        changed[name] = (tensors[name] * 100).to(torch.float8_e4m3fn)
        changed[f"{name}_scale_inv"] = torch.rand(NUM_EXPERTS, rows, 1) + 0.5
    stored = {name: value for name, value in changed.items() if value is not None}
    for form in ("apart", "fused"):
        (tmp_path / form).mkdir()
        config = json.loads((tmp_path / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
        (tmp_path / form / "config.json").write_text(json.dumps(config))
        kept = tensors | stored if form == "fused" else one_by_one(tensors | stored)
        kept = {name: value.contiguous() for name, value in kept.items()}
        save_file(kept, tmp_path / form / "model.safetensors", metadata={"format": "pt"})
    (one, _), (other, _) = loaded(tmp_path / "apart"), loaded(tmp_path / "fused")
    assert_same_bits(one, other)
    for place in range(2):
        for projection in ("w13", "w2"):
            here, there = (
                getattr(model.model.layers[place].mlp.experts, projection).record()
                for model in (one, other)
            )
            assert here.scheme is WeightScheme.FP8_BLOCK
            assert torch.equal(here.weight.view(torch.uint8), there.weight.view(torch.uint8))
            assert torch.equal(here.scale, there.scale)
    up = stored["model.layers.1.mlp.experts.gate_up_proj"][3, 128:]
    weight = other.model.layers[1].mlp.experts.w13.record().weight
    assert torch.equal(weight[3, 128:].view(torch.uint8), up.view(torch.uint8))


def test_unquantised_fused_experts_of_a_quantised_checkpoint(fused: Path, tmp_path: Path) -> None:
    """What is quantised beside them does not matter."""
    changed = with_tensors(fused, tmp_path, {})
    config = json.loads((changed / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ["model.layers.1.mlp.experts"],
    }
    (changed / "config.json").write_text(json.dumps(config))
    assert_same_bits(loaded(fused)[0], loaded(changed)[0])


def test_what_is_in_memory_is_what_is_left(apart: Path, fused: Path) -> None:
    """Each expert's weights are a part of the one parameter, and share no memory with the file."""
    model, _ = loaded(fused)
    before = {name: value.clone() for name, value in model.named_parameters()}
    model.model.layers[1].mlp.experts.w13.weight.data += 1
    again, _ = loaded(fused)
    assert all(torch.equal(value, before[name]) for name, value in again.named_parameters())
    assert_same_bits(loaded(apart)[0], again)


@pytest.mark.parametrize("model_type", [NEXT, MOE_TEXT])
def test_the_layer_that_drafts(model_type: str, tmp_path: Path) -> None:
    """Qwen3.5 stores its experts one by one and those of the model fused, Qwen3.6 fuses both.

    (llama.cpp, pull request 20533; NVIDIA-NeMo Automodel, pull request 2595.)
    """
    main, draft = their_models(model_type)
    stored = [OurDraft(save_with_draft(tmp_path / "0", main, draft))]
    names = {}
    for number, (main_is_fused, draft_is_fused) in enumerate(
        [(True, False), (False, True), (True, True)], start=1
    ):
        path = save_in_forms(tmp_path / str(number), main, draft, main_is_fused, draft_is_fused)
        names[number] = [name for name in load_file(path / "model.safetensors") if "mtp." in name]
        stored.append(OurDraft(path))
    assert [len(one) for one in names.values()] == [17 + 3 * NUM_EXPERTS, 19, 19]
    for other in stored[1:]:
        assert_same_bits(stored[0].draft, other.draft)
        assert_same_bits(stored[0].main, other.main)


def save_in_forms(
    path: Path, main: torch.nn.Module, draft: TheirDraft, main_is_fused: bool, draft_is_fused: bool
) -> Path:
    main.save_pretrained(path, save_original_format=False)
    tensors = load_file(path / "model.safetensors")
    tensors = tensors if main_is_fused else one_by_one(tensors)
    tensors |= draft.tensors(fused=draft_is_fused)
    kept = {name: value.contiguous() for name, value in tensors.items()}
    save_file(kept, path / "model.safetensors", metadata={"format": "pt"})
    return path


def test_a_quantised_copy_of_a_model_with_fused_experts(fused: Path, tmp_path: Path) -> None:
    """Its experts are quantised like those of the same model that stores them one by one."""
    outcome = mortise("quantize", tmp_path / "copy", "--model", fused, "--scheme", "fp8-block")
    assert outcome.code == 0, outcome.stderr
    model, _ = loaded(tmp_path / "copy")
    schemes = {layer.mlp.experts.w13.stored.scheme for layer in model.model.layers}
    assert schemes == {WeightScheme.FP8_BLOCK}
    exact, _ = loaded(fused)
    wide = exact.model.layers[3].mlp.experts.w2.weight
    rounded = dequantise_weight(model.model.layers[3].mlp.experts.w2.record(), torch.float32)
    assert 0 < (rounded - wide).abs().max() < 0.1 * wide.abs().max()
