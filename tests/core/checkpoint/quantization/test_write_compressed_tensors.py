"""The compressed-tensors library reads what was written, by the configuration that was written."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from tests.fixtures.compressed_models import unfuse_experts
from tests.fixtures.quantised_models import (
    NUM_LAYERS,
    ODD,
    SEEN,
    expected_weights,
    read,
    save_odd,
    stored_weights,
    unfused,
    write,
)
from tests.fixtures.tiny_models import tiny_transformers_model

from mortise.checkpoint import ModelDirectory
from mortise.checkpoint.quantization.write.recipe import Recipe, Rule

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

RECIPES = {
    "w8a8": Recipe.of("w8a8"),
    "w4a8": Recipe.of("w4a8", group_size=32),
    "w4a16": Recipe.of("w4a16", group_size=40),
    "w4a16 per channel": Recipe.of("w4a16"),
    "nvfp4": Recipe.of("nvfp4"),
    "mixed": Recipe.of(
        "w4a16",
        group_size=32,
        ignore=["*.layers.0.self_attn.o_proj"],
        rules=[
            Rule("*.layers.1.mlp.experts.*", "w8a8"),
            Rule("*.q_a_proj", "w4a8"),
            Rule("*.indexer.*", "nvfp4"),
        ],
    ),
}
FORMATS = {
    "w8a8": "int-quantized",
    "w4a8": "pack-quantized",
    "w4a16": "pack-quantized",
    "w4a16 per channel": "pack-quantized",
    "nvfp4": "nvfp4-pack-quantized",
    "mixed": "mixed-precision",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_odd(tmp_path_factory.mktemp("models") / "odd", tokenizer=False)


def library_model(section: dict[str, Any], tensors: dict[str, torch.Tensor]) -> nn.Module:
    """The model as the library builds it for a checkpoint, filled with its tensors."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    config = QuantizationConfig.model_validate(section)
    made = tiny_transformers_model(**ODD)
    unfuse_experts(made)
    apply_quantization_config(made, config, show_progress=False)
    ModelCompressor(quantization_config=config).compress_model(made)
    mtp = f"model.layers.{NUM_LAYERS}."
    own = {name: tensor for name, tensor in tensors.items() if not name.startswith(mtp)}
    expected = made.state_dict()
    for name, tensor in own.items():
        assert tensor.shape == expected[name].shape, name
    made.load_state_dict(own, strict=True, assign=True)
    return made


@pytest.mark.parametrize("name", RECIPES)
def test_the_library_reads_the_same_weights(model: Path, tmp_path: Path, name: str) -> None:
    from compressed_tensors.compressors import ModelCompressor

    projections = write(model, tmp_path / "q", RECIPES[name])
    section = ModelDirectory.open(tmp_path / "q").config["quantization_config"]
    assert section["format"] == FORMATS[name]
    theirs = library_model(section, read(tmp_path / "q"))
    quantised = {
        module for module, one in theirs.named_modules() if hasattr(one, "quantization_scheme")
    }
    expected = expected_weights(model, projections)
    assert quantised == set(expected)
    ModelCompressor().decompress_model(theirs)
    for module, weight in expected.items():
        found = theirs.get_submodule(module).weight
        if projections[module].scheme.scheme.value == "nvfp4":
            # The library multiplies in bfloat16, which has eight bits.
            torch.testing.assert_close(found.float(), weight, rtol=2**-7, atol=0)
        else:
            assert torch.equal(found, weight), module


def test_float4_is_stored_exactly(model: Path, tmp_path: Path) -> None:
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8

    projections = write(model, tmp_path / "q", RECIPES["nvfp4"])
    written = read(tmp_path / "q")
    stored = stored_weights(model, projections)
    for module, weight in expected_weights(model, projections).items():
        rows, columns = weight.shape
        packed = written[f"{module}.weight_packed"]
        values = unpack_fp4_from_uint8(packed, rows, columns, torch.float64)
        scale = written[f"{module}.weight_scale"].double().repeat_interleave(16, dim=1)
        divisor = written[f"{module}.weight_global_scale"]
        torch.testing.assert_close(
            values * scale / divisor.double(), weight.double(), rtol=2**-22, atol=0
        )
        assert divisor.item() == pytest.approx(2688 / stored_amax(model, module), rel=1e-6)
        assert written[f"{module}.input_global_scale"].item() == pytest.approx(2688 / SEEN.amax)
        assert stored[module].num_parts == 1


def stored_amax(model: Path, module: str) -> float:
    return float(read(model)[f"{module}.weight"].abs().max())


def test_the_library_means_the_same_inputs(model: Path, tmp_path: Path) -> None:
    from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme

    for name, preset in {"w8a8": "W8A8", "nvfp4": "NVFP4"}.items():
        write(model, tmp_path / name, RECIPES[name])
        section = ModelDirectory.open(tmp_path / name).config["quantization_config"]
        (group,) = QuantizationConfig.model_validate(section).config_groups.values()
        theirs = preset_name_to_scheme(preset, ["Linear"])
        assert group.weights == theirs.weights
        assert group.input_activations == theirs.input_activations


def test_transformers_reads_the_same_int4_weights(model: Path, tmp_path: Path) -> None:
    import transformers
    from transformers import CompressedTensorsConfig

    projections = write(model, tmp_path / "q", Recipe.of("w4a16"))
    with pytest.warns(UserWarning, match="dequantize"):
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "q",
            dtype=torch.float32,
            quantization_config=CompressedTensorsConfig(dequantize=True),
        )
    weights = unfused(theirs.state_dict())
    for module, weight in expected_weights(model, projections).items():
        assert torch.equal(weights[f"{module}.weight"], weight), module
