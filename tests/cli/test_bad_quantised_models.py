"""What is wrong with a quantised model is one message, which names the tensor or the layer."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.cli.command_line import failure, mortise
from tests.fixtures.tiny_models import save_tiny

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Tensors = dict[str, torch.Tensor]

EXPERT = "model.layers.1.mlp.experts.2.up_proj"
SCALES = {
    "fp8-block": "weight_scale_inv",
    "w8a8": "weight_scale",
    "w4a16": "weight_scale",
    "w4a4": "weight_scale",
    "nvfp4": "weight_scale",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny model in each scheme, as `mortise quantize` writes it."""
    folder = tmp_path_factory.mktemp("sound")
    plain = save_tiny(folder / "plain")
    for scheme in SCALES:
        outcome = mortise("quantize", folder / scheme, "--model", plain, "--scheme", scheme)
        assert outcome.code == 0, outcome.stderr
    return {"plain": plain} | {scheme: folder / scheme for scheme in SCALES}


def spoilt(model: Path, path: Path, change: Callable[[Tensors], None]) -> Path:
    """A copy of a model whose tensors were changed."""
    shutil.copytree(model, path)
    (file,) = path.glob("*.safetensors")
    tensors = load_file(file)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    return path


def rewritten(model: Path, path: Path, name: str, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of a model one of whose JSON files was changed."""
    shutil.copytree(model, path)
    content = json.loads((path / name).read_text(encoding="utf-8"))
    change(content)
    (path / name).write_text(json.dumps(content), encoding="utf-8")
    return path


def refused(model: Path, *options: str) -> str:
    return failure("generate", "x", "--model", model, "--max-tokens", "1", *options)


@pytest.mark.parametrize("scheme", SCALES)
@pytest.mark.parametrize("bad", [float("nan"), float("-inf"), -1.0, 0.0])
def test_a_scale_that_is_none(
    models: dict[str, Path], tmp_path: Path, scheme: str, bad: float
) -> None:
    name = f"{EXPERT}.{SCALES[scheme]}"
    if scheme == "nvfp4" and bad == float("-inf"):
        bad = -0.5  # e4m3 has no infinity

    def change(tensors: Tensors) -> None:
        flat = tensors[name].float().flatten()
        flat[1 if flat.numel() > 1 else 0] = bad
        tensors[name] = flat.view(tensors[name].shape).to(tensors[name].dtype)

    message = refused(spoilt(models[scheme], tmp_path / "bad", change))
    assert name in message
    assert "scale" in message.splitlines()[0]


@pytest.mark.parametrize("scheme", SCALES)
def test_scales_of_another_shape(models: dict[str, Path], tmp_path: Path, scheme: str) -> None:
    name = f"{EXPERT}.{SCALES[scheme]}"

    def change(tensors: Tensors) -> None:
        tensors[name] = torch.cat([tensors[name], tensors[name]], dim=-1)

    message = refused(spoilt(models[scheme], tmp_path / "bad", change))
    assert EXPERT in message
    assert "columns" in message or "shape" in message or "stored differently" in message


@pytest.mark.parametrize("scheme", ["w4a16", "nvfp4"])
def test_a_packed_tensor_that_lacks_a_column(
    models: dict[str, Path], tmp_path: Path, scheme: str
) -> None:
    name = f"{EXPERT}.weight_packed"

    def change(tensors: Tensors) -> None:
        tensors[name] = tensors[name][:, :-1]

    assert name in refused(spoilt(models[scheme], tmp_path / "bad", change))


@pytest.mark.parametrize("scheme", SCALES)
def test_a_weight_without_its_scales(models: dict[str, Path], tmp_path: Path, scheme: str) -> None:
    name = f"{EXPERT}.{SCALES[scheme]}"

    def change(tensors: Tensors) -> None:
        del tensors[name]

    assert name in refused(spoilt(models[scheme], tmp_path / "bad", change))


def test_a_quantisation_method_that_nobody_knows(models: dict[str, Path], tmp_path: Path) -> None:
    def change(config: dict[str, Any]) -> None:
        config["quantization_config"]["quant_method"] = "aqlm"

    message = refused(rewritten(models["fp8-block"], tmp_path / "bad", "config.json", change))
    assert "'aqlm'" in message
    assert "compressed-tensors" in message


def test_a_scheme_that_nobody_knows(models: dict[str, Path], tmp_path: Path) -> None:
    file = "quant_model_description.json"

    def change(description: dict[str, Any]) -> None:
        description[f"{EXPERT}.weight"] = "W3A3_DYNAMIC"

    message = refused(rewritten(models["w4a4"], tmp_path / "bad", file, change))
    assert "'W3A3_DYNAMIC'" in message
    assert EXPERT in message


def test_an_ignore_list_that_names_nothing(models: dict[str, Path], tmp_path: Path) -> None:
    def change(config: dict[str, Any]) -> None:
        config["quantization_config"]["ignore"].append("model.layers.1.mlp.expert.2.up_proj")

    message = refused(rewritten(models["w8a8"], tmp_path / "bad", "config.json", change))
    assert "'model.layers.1.mlp.expert.2.up_proj'" in message


def test_a_quantised_checkpoint_that_says_nothing_of_it(
    models: dict[str, Path], tmp_path: Path
) -> None:
    def change(config: dict[str, Any]) -> None:
        del config["quantization_config"]

    message = refused(rewritten(models["w8a8"], tmp_path / "bad", "config.json", change))
    assert "quantization_config" in message


def test_an_override_that_the_experts_cannot_consume(models: dict[str, Path]) -> None:
    message = refused(models["w8a8"], "--dispatch-dtype", "nvfp4")
    assert "layer model.layers.1.mlp: " in message
    assert "nvfp4" in message
    assert "command line --dispatch-dtype" in message
