"""Checkpoints that the compressed-tensors library wrote and reads back itself."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.fixtures.compressed_models import INPUT_GLOBAL_SCALE, save_compressed
from tests.fixtures.loaded_checkpoints import load_all, open_plan, shapes_of
from tests.fixtures.tiny_models import save_tiny

from mortise.formats.weights import dequantise_weight
from mortise.spec.weights import WeightScheme

if TYPE_CHECKING:
    from pathlib import Path

EVERYTHING = ["Linear"]
NUM_LAYERS, NUM_EXPERTS = 2, 4
TINY = {"num_hidden_layers": NUM_LAYERS, "n_routed_experts": NUM_EXPERTS}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, ...]]:
    return shapes_of(save_tiny(tmp_path_factory.mktemp("float"), tokenizer=False, **TINY))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize(
    ("preset", "written", "group_size", "scheme"),
    [
        ("W8A8", None, None, WeightScheme.W8A8),
        ("W4A16", None, 16, WeightScheme.W4A16),
        ("W4A16", None, None, WeightScheme.W4A16),
        ("W4A8", "pack-quantized", 16, WeightScheme.W4A8),
        ("W4A8", None, None, WeightScheme.W4A8),
        ("W4A4", None, 16, WeightScheme.W4A4),
        ("NVFP4", None, None, WeightScheme.NVFP4),
        ("NVFP4A16", None, None, WeightScheme.NVFP4),
    ],
)
def test_dequantised_weights_equal_those_of_the_library(
    tmp_path: Path,
    shapes: dict[str, tuple[int, ...]],
    preset: str,
    written: str | None,
    group_size: int | None,
    scheme: WeightScheme,
    dtype: torch.dtype,
) -> None:
    theirs = save_compressed(
        tmp_path,
        {preset: EVERYTHING},
        formats={} if written is None else {preset: written},
        group_size=group_size,
        dtype=dtype,
        **TINY,
    )
    ours = load_all(tmp_path, shapes)
    kinds = Counter(stored.scheme for stored in ours.values())
    # The head and the router of the layer of experts stay as they are.
    assert kinds == {scheme: len(theirs), WeightScheme.FLOAT: 2}
    assert len([name for name in theirs if ".experts." in name]) == 3 * NUM_EXPERTS
    for name, weight in theirs.items():
        assert torch.equal(dequantise_weight(ours[name], weight.dtype), weight), name
    plan = open_plan(tmp_path)
    assert {plan.scheme(name).group_size for name in theirs} == {group_size}
    if scheme is WeightScheme.NVFP4:
        expected = torch.tensor([1 / INPUT_GLOBAL_SCALE]) if preset == "NVFP4" else None
        assert all(ours[name].input_scale == expected for name in theirs)


def test_float8_blocks_with_partial_ones_at_the_edges(
    tmp_path: Path, shapes: dict[str, tuple[int, ...]]
) -> None:
    theirs = save_compressed(tmp_path, {"FP8_BLOCK": EVERYTHING}, dtype=torch.float32, **TINY)
    ours = load_all(tmp_path, shapes)
    assert any(size % 128 for name in theirs for size in shapes[f"{name}.weight"])
    for name, weight in theirs.items():
        assert ours[name].scheme is WeightScheme.FP8_BLOCK
        assert torch.equal(dequantise_weight(ours[name]), weight), name


def test_groups_of_a_mixed_checkpoint(tmp_path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    groups = {
        "W4A16": [r"re:.*experts\.\d+\.(gate|up)_proj"],
        "NVFP4": [r"re:.*experts\.\d+\.down_proj"],
        "W8A8": EVERYTHING,
    }
    ignored = [r"re:.*self_attn.*", "model.layers.0.mlp.up_proj"]
    theirs = save_compressed(tmp_path, groups, ignore=ignored, **TINY)
    ours = load_all(tmp_path, shapes)
    plan = open_plan(tmp_path)
    for name, weight in theirs.items():
        assert torch.equal(dequantise_weight(ours[name], weight.dtype), weight), name
    experts = [f"model.layers.1.mlp.experts.{number}" for number in range(NUM_EXPERTS)]
    first = [f"{expert}.{part}" for expert in experts for part in ("gate_proj", "up_proj")]
    assert plan.common_scheme(first).scheme is WeightScheme.W4A16
    second = [f"{expert}.down_proj" for expert in experts]
    assert plan.common_scheme(second).scheme is WeightScheme.NVFP4
    assert plan.common_scheme(second).static_input
    shared = plan.common_scheme(["model.layers.1.mlp.shared_experts.up_proj"])
    assert shared.scheme is WeightScheme.W8A8
    assert shared.reason == (
        f"config_groups.{group_with(tmp_path, EVERYTHING)} in quantization_config of config.json"
        " says w8a8, written as int-quantized"
    )
    for name in ("model.layers.0.mlp.up_proj", "model.layers.1.self_attn.o_proj"):
        assert plan.scheme(name).scheme is WeightScheme.FLOAT
        assert plan.scheme(name).reason == ("ignore in quantization_config of config.json lists it")


def group_with(directory: Path, targets: list[str]) -> str:
    """The name that the library gave a group."""
    written = json.loads((directory / "config.json").read_text())["quantization_config"]
    groups = written["config_groups"].items()
    return next(name for name, group in groups if group["targets"] == targets)


def test_targets_are_matched_as_the_library_matches_them(tmp_path: Path) -> None:
    from compressed_tensors.utils.match import match_name, match_targets

    groups = {"W4A16": [r"re:.*\.up_proj", "model.layers.0.mlp.down_proj"], "W8A8": EVERYTHING}
    save_compressed(tmp_path, groups, ignore=[r"re:.*layers\.1\.self"], **TINY)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    schemes = {
        target: "w8a8" if group["weights"]["num_bits"] == 8 else "w4a16"
        for group in config["config_groups"].values()
        for target in group["targets"]
    }
    plan = open_plan(tmp_path)
    modules = [name for name in shapes_of(tmp_path) if name.endswith("_proj.weight_scale")]
    for module in (name.removesuffix(".weight_scale") for name in modules):
        assert not any(match_name(module, entry) for entry in config["ignore"])
        target = match_targets(module, torch.nn.Linear(1, 1), schemes)[0]
        assert plan.scheme(module).scheme == schemes[target], module
    ignored = [name for name in shapes_of(tmp_path) if ".layers.1.self_attn.q_a_proj" in name]
    assert ignored == ["model.layers.1.self_attn.q_a_proj.weight"]


def test_the_library_reads_modelopt_as_we_do(
    tmp_path: Path, shapes: dict[str, tuple[int, ...]]
) -> None:
    """Its converter from modelopt, and then its way back, against ours."""
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.entrypoints.convert.converters.modelopt_nvfp4 import (
        ModelOptNvfp4Converter,
    )
    from compressed_tensors.quantization import preset_name_to_scheme
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    save_compressed(tmp_path / "theirs", {"NVFP4": EVERYTHING}, **TINY)
    tensors = load_file(tmp_path / "theirs" / "model.safetensors")
    written = {modelopt_name(name): modelopt_values(name, t) for name, t in tensors.items()}
    (tmp_path / "ours").mkdir()
    save_file(written, tmp_path / "ours" / "model.safetensors")
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    excluded = ["lm_head", "model.layers.1.mlp.gate", "model.embed_tokens", "model.norm*"]
    config["quantization_config"] = {
        "quant_method": "modelopt",
        "quant_algo": "NVFP4",
        "ignore": excluded,
    }
    (tmp_path / "ours" / "config.json").write_text(json.dumps(config))
    ours = load_all(tmp_path / "ours", shapes)
    converted = ModelOptNvfp4Converter(targets=[r"re:.*(proj|mqa|wk|wq_b)$"]).process({**written})
    scheme = preset_name_to_scheme("NVFP4", EVERYTHING)
    quantised = [name for name, stored in ours.items() if stored.scheme is WeightScheme.NVFP4]
    assert len(quantised) > 3 * NUM_EXPERTS
    for module in quantised:
        leaves = {
            name.removeprefix(f"{module}."): tensor
            for name, tensor in converted.items()
            if name.rpartition(".")[0] == module
        }
        packed = leaves["weight_packed"]
        weight = dequantize(
            unpack_fp4_from_uint8(packed, packed.shape[0], 2 * packed.shape[1], torch.float32),
            leaves["weight_scale"].float(),
            args=scheme.weights,
            global_scale=leaves["weight_global_scale"],
        )
        # The converter takes a reciprocal, and the library divides by it: two roundings.
        torch.testing.assert_close(dequantise_weight(ours[module]), weight, rtol=2**-22, atol=0.0)
        input_scale = ours[module].input_scale
        assert input_scale is not None
        assert torch.equal(input_scale, written[f"{module}.input_scale"].reshape(1))


MODELOPT_LEAVES = {
    "weight_packed": "weight",
    "weight_global_scale": "weight_scale_2",
    "input_global_scale": "input_scale",
}


def modelopt_name(name: str) -> str:
    module, _, leaf = name.rpartition(".")
    return f"{module}.{MODELOPT_LEAVES.get(leaf, leaf)}"


def modelopt_values(name: str, tensor: torch.Tensor) -> torch.Tensor:
    return (1 / tensor).reshape(()) if name.endswith("_global_scale") else tensor
