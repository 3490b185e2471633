"""What a plan says of checkpoints in every dialect."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from tests.fixtures.loaded_checkpoints import allocate, open_plan
from tests.fixtures.quantised_modules import (
    FLOAT4_GROUP,
    FP8,
    GATE,
    NVFP4,
    UP,
    K,
    N,
    Tensors,
    compressed,
    compressed_float4_tensors,
    directory,
    failure,
    filled,
    float4_tensors,
    fp8_tensors,
    int4_group,
    int4_tensors,
    int8_tensors,
    loaded,
    weight,
)

from mortise.checkpoint import CheckpointTensors, ModelDirectory, load_weights
from mortise.checkpoint.quantization.module_scheme import ModuleScheme
from mortise.checkpoint.quantization.plan import QuantizationPlan
from mortise.errors import (
    UnexpectedTensorError,
)
from mortise.formats.weights import dequantise_weight, quantise_weight
from mortise.spec.weights import ScaleFormat, StoredWeight, WeightScheme

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def test_nothing_is_quantised_where_nothing_says_so(tmp_path: Path) -> None:
    plan = open_plan(directory(tmp_path, {f"{GATE}.weight": weight()}))
    assert plan.scheme(GATE) == plan.common_scheme([GATE, UP]) == ModuleScheme()
    assert plan.skips() == ()
    plan.check_names([GATE])


@pytest.mark.parametrize(
    ("config", "tensors", "scheme"),
    [
        (FP8, fp8_tensors, WeightScheme.FP8_BLOCK),
        (NVFP4, float4_tensors, WeightScheme.NVFP4),
        (
            NVFP4 | {"quant_method": "modelopt_fp4", "quant_algo": "nvfp4"},
            float4_tensors,
            WeightScheme.NVFP4,
        ),
        (
            {"quantization": {"quant_algo": "NVFP4", "group_size": 16}},
            float4_tensors,
            WeightScheme.NVFP4,
        ),
        (compressed(), int8_tensors, WeightScheme.W8A8),
        (compressed(int4_group()), int4_tensors, WeightScheme.W4A16),
        (compressed(FLOAT4_GROUP), compressed_float4_tensors, WeightScheme.NVFP4),
    ],
)
def test_every_dialect_is_found_by_its_configuration(
    tmp_path: Path,
    config: dict[str, Any],
    tensors: Callable[[str], Tensors],
    scheme: WeightScheme,
) -> None:
    path = directory(tmp_path, tensors(GATE) | {f"{UP}.weight": weight().bfloat16()}, config)
    plan = open_plan(path)
    assert plan.scheme(GATE).scheme is scheme
    assert plan.scheme(GATE).dialect in {"fp8", "modelopt", "compressed-tensors"}
    text = failure(UnexpectedTensorError, loaded, path)
    assert "the checkpoint holds 1 tensor that the model does not know" in text
    found = loaded(directory(tmp_path, tensors(GATE), config))
    group_size = 16 if scheme is WeightScheme.W4A16 else None
    stored = quantise_weight(weight(), scheme, group_size=group_size)
    torch.testing.assert_close(found, dequantise_weight(stored), rtol=2**-22, atol=0.0)


def test_modelopt_describes_itself_in_a_file_of_its_own(tmp_path: Path) -> None:
    content = {
        "producer": {"name": "modelopt", "version": "0.43.0"},
        "quantization": {
            "quant_algo": "NVFP4",
            "kv_cache_quant_algo": "FP8",
            "group_size": 16,
            "exclude_modules": ["lm_head", "model.layers.0.mlp.up*", "lm_head"],
        },
    }
    tensors = float4_tensors(GATE) | {f"{UP}.weight": weight(), "a.k_proj.k_scale": torch.ones(1)}
    plan = open_plan(directory(tmp_path, tensors, None, hf_quant_config=content))
    assert plan.scheme(GATE).reason == ("hf_quant_config.json says NVFP4 and does not exclude it")
    assert plan.scheme(UP).reason == "hf_quant_config.json excludes it"
    (skip,) = plan.skips()
    assert skip.reason == "keys and values are cached unquantised"


@pytest.mark.parametrize(
    "config",
    [
        compressed(ignore=["lm_head", "re:.*mtp", "model.layers.1", "mtp.0.eh_proj"]),
        FP8 | {"modules_to_not_convert": ["lm_head", "eh_proj", r"model.layers.\d"]},
        NVFP4 | {"ignore": ["lm_head", "mtp*", "model.layers.1", "eh_proj"]},
    ],
)
def test_entries_may_name_parts_of_the_model_and_modules_of_the_checkpoint_alone(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    tensors = {"mtp.0.eh_proj.weight": weight(), f"{GATE}.weight": weight()}
    opened = ModelDirectory.open(directory(tmp_path, tensors, config))
    plan = QuantizationPlan.read(opened, CheckpointTensors(opened.weight_files()))
    plan.check_names(["model.layers.1.mlp.up_proj"])


def test_zero_scales_are_right_over_zeros(tmp_path: Path) -> None:
    for config, tensors in (
        (FP8, fp8_tensors),
        (NVFP4, float4_tensors),
        (compressed(), int8_tensors),
    ):
        held = tensors(GATE)
        weights = held[f"{GATE}.weight"]
        held[f"{GATE}.weight"] = torch.zeros_like(weights.float()).to(weights.dtype)
        leaf = "weight_scale_inv" if tensors is fp8_tensors else "weight_scale"
        held[f"{GATE}.{leaf}"] = filled(0)(held[f"{GATE}.{leaf}"])
        assert loaded(directory(tmp_path, held, config)).abs().sum() == 0


def test_power_of_two_scales_may_be_written_as_floats(tmp_path: Path) -> None:
    stored = quantise_weight(weight(), WeightScheme.FP8_BLOCK, scale_format=ScaleFormat.UE8M0)
    assert stored.scale is not None
    held = {f"{GATE}.weight": stored.weight, f"{GATE}.weight_scale_inv": stored.scale.bfloat16()}
    path = directory(tmp_path, held, FP8 | {"scale_fmt": "ue8m0"})
    assert torch.equal(loaded(path), dequantise_weight(stored))
    assert open_plan(path).scheme(GATE).scale_format is ScaleFormat.UE8M0


def test_gate_and_up_fill_their_halves_of_one_tensor(tmp_path: Path) -> None:
    """The views that layers hand out, with scales and global scales of each half's own."""
    held = float4_tensors(GATE) | {
        name.replace("gate", "up"): tensor.flip(0) if tensor.ndim else 2 * tensor
        for name, tensor in float4_tensors(GATE).items()
    }
    plan = open_plan(directory(tmp_path, held, NVFP4))
    scheme = plan.common_scheme([GATE, UP])
    fused = allocate(scheme, 2 * N, K, num_parts=2)
    assert fused.scale is not None
    assert fused.global_scale is not None and fused.input_scale is not None
    halves = [
        StoredWeight(
            scheme=scheme.scheme,
            weight=fused.weight.chunk(2)[half],
            scale=fused.scale.chunk(2)[half],
            global_scale=fused.global_scale.chunk(2)[half],
            input_scale=fused.input_scale.chunk(2)[half],
        )
        for half in range(2)
    ]
    tensors = CheckpointTensors(ModelDirectory.open(tmp_path).weight_files())
    placements = [
        placement
        for module, half in zip((GATE, UP), halves, strict=True)
        for placement in plan.placements(module, half, scheme)
    ]
    load_weights(tensors, placements)
    gate, up = dequantise_weight(fused).chunk(2)
    assert torch.equal(gate, loaded_alone(tmp_path / "gate", held, GATE))
    assert torch.equal(up, loaded_alone(tmp_path / "up", held, UP))
    assert torch.allclose(fused.input_scale, torch.tensor([0.02, 0.04]))


def loaded_alone(path: Path, held: Tensors, module: str) -> torch.Tensor:
    own = {name: tensor for name, tensor in held.items() if name.startswith(module)}
    return loaded(directory(path, own, NVFP4), module)


def test_without_a_strategy_the_size_of_groups_says_who_shares_a_scale(tmp_path: Path) -> None:
    group = int4_group()
    del group["weights"]["strategy"]
    plan = open_plan(directory(tmp_path, int4_tensors(GATE), compressed(group)))
    assert plan.scheme(GATE).group_size == 16
    group["weights"]["group_size"] = -1
    stored = quantise_weight(weight(), WeightScheme.W4A16)
    assert stored.scale is not None
    held = int4_tensors(GATE) | {f"{GATE}.weight_scale": stored.scale}
    plan = open_plan(directory(tmp_path, held, compressed(group)))
    assert plan.scheme(GATE).group_size is None


@pytest.mark.parametrize("config", [FP8, NVFP4, compressed()])
def test_modules_without_a_weight_are_not_quantised(tmp_path: Path, config: dict[str, Any]) -> None:
    held = {f"{UP}.bias": torch.ones(1)}
    plan = open_plan(directory(tmp_path, held, config))
    assert plan.scheme(GATE).reason == "the checkpoint holds no tensor of it"
    assert plan.scheme(UP).reason == "the checkpoint holds no weight of it"
    assert plan.scheme(GATE).scheme is plan.scheme(UP).scheme is WeightScheme.FLOAT
