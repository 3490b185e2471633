"""Checkpoints that transformers' quantiser of float8 blocks wrote."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tests.fixtures.fp8_models import save_fp8
from tests.fixtures.loaded_checkpoints import load_all, open_plan, shapes_of

from mortise.formats.weights import dequantise_weight
from mortise.spec.weights import ScaleFormat, WeightScheme

if TYPE_CHECKING:
    from pathlib import Path

    from mortise.spec.weights import StoredWeight

NUM_EXPERTS = 4
TINY = {"num_hidden_layers": 2, "n_routed_experts": NUM_EXPERTS}


def dequantised_by_transformers(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """What its own way back makes of a weight, in float32."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    return Fp8Dequantize(None)._dequantize_one(weight, scale, torch.float32)


def theirs(model: Any) -> dict[str, torch.Tensor]:
    """Every float8 weight of the object, dequantised, by the hub's names."""
    from transformers.integrations.finegrained_fp8 import FP8Experts, FP8Linear

    found = {}
    for name, module in model.named_modules():
        if isinstance(module, FP8Linear) and module.weight.dtype == torch.float8_e4m3fn:
            found[name] = dequantised_by_transformers(module.weight, module.weight_scale_inv)
        if isinstance(module, FP8Experts):
            for number in range(NUM_EXPERTS):
                gate_up = dequantised_by_transformers(
                    module.gate_up_proj[number], module.gate_up_proj_scale_inv[number]
                )
                gate, up = gate_up.chunk(2)
                down = dequantised_by_transformers(
                    module.down_proj[number], module.down_proj_scale_inv[number]
                )
                parts = {"gate_proj": gate, "up_proj": up, "down_proj": down}
                found |= {f"{name}.{number}.{part}": weight for part, weight in parts.items()}
    return found


@pytest.fixture(scope="module", params=["float", "ue8m0"])
def saved(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Any, Path, Path]:
    original, quantised = tmp_path_factory.mktemp("float"), tmp_path_factory.mktemp("fp8")
    model = save_fp8(quantised, original, scale_fmt=request.param, **TINY)
    return request.param, model, original, quantised


def load(saved: tuple[str, Any, Path, Path]) -> dict[str, StoredWeight]:
    _, _, original, quantised = saved
    return load_all(quantised, shapes_of(original))


def test_dequantised_weights_equal_those_of_transformers(
    saved: tuple[str, Any, Path, Path],
) -> None:
    scale_fmt, model, *_ = saved
    ours = load(saved)
    quantised = theirs(model)
    assert len([name for name in quantised if ".experts." in name]) == 3 * NUM_EXPERTS
    for name, weight in quantised.items():
        assert ours[name].scheme is WeightScheme.FP8_BLOCK
        assert (ours[name].scale_format is ScaleFormat.UE8M0) == (scale_fmt == "ue8m0")
        assert torch.equal(dequantise_weight(ours[name]), weight.detach()), name


def test_what_blocks_do_not_divide_is_float_whatever_scale_lies_beside_it(
    saved: tuple[str, Any, Path, Path],
) -> None:
    _, model, _, directory = saved
    ours, parameters = load(saved), dict(model.named_parameters())
    name = "model.layers.1.self_attn.kv_a_proj_with_mqa"
    assert f"{name}.weight_scale_inv" in shapes_of(directory)
    assert ours[name].scheme is WeightScheme.FLOAT
    assert torch.equal(ours[name].weight, parameters[f"{name}.weight"].float())
    (skip,) = open_plan(directory).skips()
    assert skip.reason == "beside a weight that is not quantised"


def test_scales_of_experts_are_read_from_the_tensor_of_all_of_them(
    saved: tuple[str, Any, Path, Path],
) -> None:
    names = shapes_of(saved[-1])
    assert names["model.layers.1.mlp.experts.gate_up_proj_scale_inv"] == (NUM_EXPERTS, 2, 1)
    assert "model.layers.1.mlp.experts.0.gate_proj.weight_scale_inv" not in names


def test_the_list_of_exceptions_is_read_as_transformers_reads_it(
    tmp_path: Path, saved: tuple[str, Any, Path, Path]
) -> None:
    from transformers.quantizers.quantizers_utils import should_convert_module

    from mortise.checkpoint.quantization.fp8_block import Fp8Block, Fp8Config

    entries = ["lm_head", "model.layers.1", r"model.layers.\d.mlp", "q_a_proj", "mlp.gate", "o["]
    raw = json.loads((saved[-1] / "config.json").read_text())["quantization_config"]
    modules = [name.rpartition(".")[0] for name in shapes_of(saved[-1])]
    modules += ["model.layers.11.mlp.up_proj", "model.layers.1.mlp.gate_proj", "a.o["]
    for entry in entries[:-1]:
        dialect = Fp8Block(Fp8Config(**{**raw, "modules_to_not_convert": (entry,)}), None)
        for name in modules:
            excluded = bool(dialect._excluded.match(name))
            assert excluded != should_convert_module(name, [entry]), (entry, name)
    # Where transformers would fail to compile the entry, it is a name.
    dialect = Fp8Block(Fp8Config(**{**raw, "modules_to_not_convert": ("o[",)}), None)
    assert dialect._excluded.match("a.o[")
