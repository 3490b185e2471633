"""ModelSlim's layout is read with numpy, from what msmodelslim's own saver writes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from tests.fixtures.quantised_models import SEEN, expected_weights, read, save_odd, write

from mortise.checkpoint import ModelDirectory, save_checkpoint
from mortise.checkpoint.json_file import read_json_object
from mortise.checkpoint.quantization.write.recipe import Recipe, Rule
from mortise.errors import QuantizationConfigError

if TYPE_CHECKING:
    from pathlib import Path

MIXED = Recipe.of(
    "w8a8",
    "modelslim",
    group_size=40,
    rules=[
        Rule("*.experts.*.down_proj", "w8a8"),
        Rule("*.experts.*", "w4a4"),
        Rule("*.self_attn.o_proj", "w4a8"),
        Rule("*.self_attn.kv_b_proj", "w4a8"),
        Rule("*.self_attn.*", "w8a8-static"),
        Rule("*.layers.0.mlp.*", "w4a8"),
    ],
)
TYPES = {"w8a8": "W8A8_DYNAMIC", "w8a8-static": "W8A8", "w4a8": "W4A8_DYNAMIC"}
DESCRIPTION = "quant_model_description.json"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_odd(tmp_path_factory.mktemp("models") / "odd", tokenizer=False)


class Written:
    """A directory in the layout, as numpy sees it."""

    def __init__(self, path: Path) -> None:
        self.description: dict[str, Any] = read_json_object(path / DESCRIPTION)
        self.tensors = {
            name: (tensor.float() if tensor.dtype is torch.bfloat16 else tensor).numpy()
            for name, tensor in read(path).items()
        }

    def leaves(self, module: str) -> dict[str, np.ndarray]:
        return {
            name.removeprefix(f"{module}."): tensor
            for name, tensor in self.tensors.items()
            if name.startswith(f"{module}.")
        }

    def weight(self, module: str) -> np.ndarray:
        leaves = self.leaves(module)
        values = leaves["weight"]
        assert values.dtype == np.int8
        match self.description[f"{module}.weight"]:
            case "W8A8":
                factor = leaves["deq_scale"]
                if factor.dtype == np.int64:
                    factor = factor.astype(np.uint32).view(np.float32)
                return values * (factor / leaves["input_scale"])[:, None]
            case "W4A8_DYNAMIC":
                values = two_rows_a_byte(values)
        assert not leaves["weight_offset"].any()
        assert leaves["weight_offset"].shape == leaves["weight_scale"].shape
        return values * np.repeat(
            leaves["weight_scale"], values.shape[1] // leaves["weight_scale"].shape[1], axis=1
        )


def two_rows_a_byte(packed: np.ndarray) -> np.ndarray:
    low, high = (packed << 4) >> 4, packed >> 4
    return np.stack([low, high], axis=1).reshape(-1, packed.shape[1])


def test_every_type_is_read_back(model: Path, tmp_path: Path) -> None:
    projections = write(model, tmp_path / "q", MIXED)
    written = Written(tmp_path / "q")
    expected = expected_weights(model, projections)
    found = {written.description[f"{module}.weight"] for module in expected}
    assert found == {"W8A8", "W8A8_DYNAMIC", "W4A8_DYNAMIC", "W4A4_DYNAMIC"}
    for module, weight in expected.items():
        np.testing.assert_allclose(
            written.weight(module), weight.numpy(), rtol=1e-6, err_msg=module
        )


def test_every_tensor_is_described(model: Path, tmp_path: Path) -> None:
    projections = write(model, tmp_path / "q", MIXED)
    written = Written(tmp_path / "q")
    about = {"version", "model_quant_type", "metadata", "group_size", "optional"}
    assert set(written.description) == set(written.tensors) | about
    assert {key: written.description[key] for key in about} == {
        "version": "1.0.0",
        "model_quant_type": "W4A4_DYNAMIC",
        "metadata": {},
        "group_size": 40,
        "optional": {},
    }
    for name in written.tensors:
        projection = projections.get(name.rpartition(".")[0])
        is_float = projection is None or not projection.is_quantised
        assert (written.description[name] == "FLOAT") == is_float, name
    config = ModelDirectory.open(tmp_path / "q").config
    assert config == ModelDirectory.open(model).config


@pytest.mark.parametrize(("scheme", "kind"), [("w8a8", "W8A8_DYNAMIC"), ("w4a8", "FLOAT")])
def test_the_type_of_the_model(model: Path, tmp_path: Path, scheme: str, kind: str) -> None:
    # msmodelslim never names a model by W4A8_DYNAMIC, and something is always unquantised.
    write(model, tmp_path / "q", Recipe.of(scheme, "modelslim"))
    assert read_json_object(tmp_path / "q" / DESCRIPTION)["model_quant_type"] == kind


def test_sums_that_undo_the_shift_of_int4(model: Path, tmp_path: Path) -> None:
    write(model, tmp_path / "q", Recipe.of("w4a8", "modelslim"))
    written = Written(tmp_path / "q")
    for module, parts in {
        "model.layers.0.mlp.gate_proj": 1,
        "model.layers.1.mlp.experts.2.up_proj": 1,
        "model.layers.0.self_attn.kv_b_proj": 1,
        "model.layers.1.mlp.experts.2.down_proj": 16,
        "model.layers.0.self_attn.o_proj": 16,
    }.items():
        weight = written.weight(module)
        sums = weight.reshape(len(weight), parts, -1).sum(axis=2)
        np.testing.assert_allclose(
            written.leaves(module)["scale_bias"], 8 * sums, rtol=1e-4, atol=1e-3
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_static_int8_computes_the_product(tmp_path: Path, dtype: torch.dtype) -> None:
    plain = save_odd(tmp_path / "m", tokenizer=False, dtype=dtype, attention_bias=True)
    biases = {name: tensor for name, tensor in read(plain).items() if name.endswith("proj.bias")}
    for tensor in biases.values():
        tensor.copy_(torch.randn(tensor.shape))
    config = dict(ModelDirectory.open(plain).config)
    save_checkpoint(tmp_path / "biased", read(plain) | biases, config)
    write(
        tmp_path / "biased",
        tmp_path / "q",
        Recipe.of("w8a8", "modelslim", rules=[Rule("*.o_proj", "w8a8-static")]),
    )
    written = Written(tmp_path / "q")
    module = "model.layers.0.self_attn.o_proj"
    leaves = written.leaves(module)
    assert {name: leaf.dtype.name for name, leaf in leaves.items()} == {
        "weight": "int8",
        "quant_bias": "int32",
        "input_scale": "float32",
        "input_offset": "float32",
        "deq_scale": "float32" if dtype is torch.bfloat16 else "int64",
        "bias": "float32",
    }
    weight, bias = (
        read(tmp_path / "biased")[f"{module}.{leaf}"].float().numpy() for leaf in ("weight", "bias")
    )
    rows = np.random.default_rng(0).uniform(SEEN.low, SEEN.high, (50, weight.shape[1]))
    steps = np.rint(rows / leaves["input_scale"] + leaves["input_offset"])
    assert steps.min() >= -128
    assert steps.max() <= 127
    factor = leaves["deq_scale"]
    if dtype is not torch.bfloat16:
        factor = factor.astype(np.uint32).view(np.float32)
    product = (steps @ leaves["weight"].T.astype(np.float64) + leaves["quant_bias"]) * factor
    exact = rows @ weight.T + bias
    assert np.sqrt(((product - exact) ** 2).mean() / (exact**2).mean()) < 0.02
    assert np.abs(bias).mean() > 0.1


def test_a_bias_beyond_int32_is_refused(tmp_path: Path) -> None:
    plain = save_odd(tmp_path / "m", tokenizer=False, attention_bias=True)
    tensors = read(plain)
    name = "model.layers.1.self_attn.o_proj.bias"
    tensors[name] = torch.full_like(tensors[name], 1e9)
    save_checkpoint(tmp_path / "large", tensors, dict(ModelDirectory.open(plain).config))
    with pytest.raises(QuantizationConfigError) as caught:
        write(tmp_path / "large", tmp_path / "q", Recipe.of("w8a8-static"))
    assert "model.layers.1.self_attn.o_proj: its bias is too large" in caught.value.what
    assert not (tmp_path / "q").exists()
