"""Checkpoints that a plan refuses, and what it says of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import pytest
import torch
from tests.fixtures.loaded_checkpoints import allocate, open_plan
from tests.fixtures.quantised_modules import (
    FLOAT4,
    FLOAT4_GROUP,
    FP8,
    GATE,
    INT8_ARGUMENTS,
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

from mortise.checkpoint import CheckpointTensors, ModelDirectory, Placement, load_weights
from mortise.errors import (
    MissingTensorError,
    MortiseError,
    QuantizationConfigError,
    ScaleError,
    TensorMismatchError,
)
from mortise.spec.weights import WeightScheme

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


Make: TypeAlias = "Callable[[str], Tensors]"
Break: TypeAlias = "Callable[[torch.Tensor], torch.Tensor]"
Case: TypeAlias = tuple[dict[str, Any], Make, str, Break, type[MortiseError], str]


@pytest.mark.parametrize(
    ("config", "files", "one", "other"),
    [
        (
            FP8,
            {"hf_quant_config": {}},
            "config.json",
            "hf_quant_config.json",
        ),
        (FP8, {"quant_model_description": {}}, "quant_model_description.json", "config.json"),
        (
            None,
            {"quant_model_description": {}, "hf_quant_config": {}},
            "quant_model_description.json",
            "hf_quant_config.json",
        ),
        (
            None,
            {"quant_model_description_w8a8": {}, "quant_model_description_w4a8": {}},
            "quant_model_description_w4a8.json",
            "quant_model_description_w8a8.json",
        ),
    ],
)
def test_two_descriptions_of_one_checkpoint(
    tmp_path: Path, config: object, files: dict[str, object], one: str, other: str
) -> None:
    path = directory(tmp_path, fp8_tensors(GATE), config, **files)
    text = failure(QuantizationConfigError, open_plan, path)
    first = text.splitlines()[0]
    assert one in first
    assert other in first
    assert first.endswith("both describe how the model is quantised")


@pytest.mark.parametrize(
    ("config", "message", "expected"),
    [
        (
            {"quant_method": "awq"},
            "quantization_config of config.json: quant_method is 'awq'",
            "one of compressed-tensors, fp8, modelopt, modelopt_fp4",
        ),
        ({}, "quantization_config of config.json: quant_method is None", "one of"),
        (["fp8"], "config.json: quantization_config is ['fp8']", "one of an object"),
        (
            {"quant_method": "fp8"},
            "quantization_config of config.json: weight_block_size is missing",
            "weight_block_size, which says how the weights are stored",
        ),
        (
            FP8 | {"weight_block_size": [64, 128]},
            "quantization_config of config.json: weight_block_size is [64, 128]",
            "[128, 128]",
        ),
        (
            FP8 | {"weight_block_size": None, "activation_scheme": "static"},
            "also: weight_block_size is None",
            "'dynamic'",
        ),
        (
            NVFP4 | {"quant_algo": "MIXED_PRECISION"},
            "quantization_config of config.json: quant_algo is 'MIXED_PRECISION'",
            "'NVFP4'",
        ),
        (NVFP4 | {"group_size": 32}, "quantization_config of config.json: group_size is 32", "16"),
        (
            compressed({"weights": INT8_ARGUMENTS | {"strategy": "tensor"}}),
            (
                "config_groups.group_0 in quantization_config of config.json asks for weights int8"
                " tensor with input int8 token dynamic"
            ),
            "one of: weights int8 channel with input int8 token dynamic; ",
        ),
        (
            compressed({"input_activations": None}),
            "asks for weights int8 channel with input unquantised",
            "one of",
        ),
        (
            compressed({"input_activations": INT8_ARGUMENTS | {"strategy": "tensor"}}),
            "with input int8 tensor",
            "one of",
        ),
        (
            compressed({"weights": INT8_ARGUMENTS | {"symmetric": False}}),
            (
                "config_groups.group_0 in quantization_config of config.json: weights.symmetric is"
                " False"
            ),
            "symmetric weights and inputs",
        ),
        (
            compressed(int4_group(actorder="group")),
            "weights.actorder is 'group'",
            "weights quantised beforehand, columns in order",
        ),
        (
            compressed({"weights": INT8_ARGUMENTS | {"group_size": None, "dynamic": True}}),
            "weights.dynamic is True",
            "symmetric weights and inputs",
        ),
        (
            compressed({"weights": {"num_bits": 8}}),
            "asks for weights int8 tensor",
            "one of",
        ),
        (
            compressed({"output_activations": INT8_ARGUMENTS}),
            "output_activations is 'int8 channel'",
            "outputs unquantised",
        ),
        (
            compressed({"format": "marlin-24"}),
            "format for w8a8 is 'marlin-24'",
            "one of int-quantized",
        ),
        (
            compressed(int4_group() | {"format": "nvfp4-pack-quantized"}),
            "format for w4a16 is 'nvfp4-pack-quantized'",
            "one of int-quantized, pack-quantized",
        ),
        (
            compressed({"weights": FLOAT4 | {"group_size": 32}}),
            "weights float4 tensor_group of 32",
            "float4 tensor_group of 16",
        ),
        (
            compressed({"weights": INT8_ARGUMENTS | {"num_bits": "many"}}),
            "config_groups.group_0.weights.num_bits is 'many'",
            "a valid integer",
        ),
        (
            compressed(transform_config={"config_groups": {"u": {}}}),
            "quantization_config of config.json holds a transform_config",
            "without transforms",
        ),
        (
            compressed(sparsity_config={"format": "sparse-24-bitmask"}),
            "quantization_config of config.json holds a sparsity_config",
            "sparsity",
        ),
        (
            compressed({"targets": ["re:(mlp"]}),
            (
                "a target in quantization_config of config.json holds '(mlp', which is no regular"
                " expression"
            ),
            "a regular expression as Python reads it",
        ),
    ],
)
def test_a_configuration_that_cannot_be_read(
    tmp_path: Path, config: object, message: str, expected: str
) -> None:
    path = directory(tmp_path, {f"{GATE}.weight": weight()}, config)
    text = failure(QuantizationConfigError, open_plan, path)
    assert message in text
    assert f"expected: {expected}" in text or expected in text.partition("expected: ")[2]
    assert "remedy: " in text


@pytest.mark.parametrize(
    ("config", "tensors", "message", "said"),
    [
        (
            compressed(),
            {f"{GATE}.weight": weight().bfloat16()},
            f"tensor {GATE}.weight is bfloat16",
            "config_groups.group_0 in quantization_config of config.json says w8a8",
        ),
        (
            compressed(ignore=[GATE]),
            int8_tensors(GATE),
            f"tensor {GATE}.weight is int8",
            "ignore in quantization_config of config.json lists it",
        ),
        (
            compressed(ignore=["re:.*gate"]),
            int4_tensors(GATE),
            f"tensor {GATE}.weight_packed is int32",
            "ignore in quantization_config of config.json lists it",
        ),
        (
            compressed({"targets": [f"{UP}"]}),
            int8_tensors(GATE) | int8_tensors(UP),
            f"tensor {GATE}.weight is int8",
            "no target in quantization_config of config.json names it",
        ),
        (
            compressed(),
            int4_tensors(GATE),
            f"tensor {GATE}.weight_packed is int32",
            "says w8a8, written as int-quantized",
        ),
        (
            NVFP4,
            {f"{GATE}.weight": weight()},
            f"tensor {GATE}.weight is float32",
            "quantization_config of config.json says NVFP4 and does not exclude it",
        ),
        (
            NVFP4 | {"ignore": ["model.layers.0.mlp"]},
            float4_tensors(GATE),
            f"tensor {GATE}.weight is uint8",
            "quantization_config of config.json excludes it",
        ),
        (
            FP8,
            int8_tensors(GATE),
            f"tensor {GATE}.weight is int8",
            "quantization_config of config.json says fp8: float8_e4m3fn",
        ),
        (
            FP8 | {"modules_to_not_convert": [GATE]},
            fp8_tensors(GATE),
            f"tensor {GATE}.weight is float8_e4m3fn",
            "quantization_config of config.json lists it as not converted",
        ),
        (
            FP8,
            {
                f"{GATE}.weight": torch.ones(128, 128).bfloat16(),
                f"{GATE}.weight_scale_inv": torch.ones(1, 1),
            },
            f"tensor {GATE}.weight is bfloat16",
            f"{GATE}.weight_scale_inv beside it says float8_e4m3fn",
        ),
    ],
)
def test_tensors_that_contradict_what_is_said_of_them(
    tmp_path: Path, config: dict[str, Any], tensors: Tensors, message: str, said: str
) -> None:
    plan = open_plan(directory(tmp_path, tensors, config))
    text = failure(QuantizationConfigError, plan.scheme, GATE)
    lines = text.splitlines()
    assert lines[0] == f"{message}, which contradicts what the checkpoint says of it"
    assert said in lines[1]


@pytest.mark.parametrize(
    ("config", "where", "entry"),
    [
        (compressed(ignore=["lm_head", "model.layers.9"]), "ignore in", "model.layers.9"),
        (compressed(ignore=["re:.*vision.*"]), "ignore in", "re:.*vision.*"),
        (
            compressed({"targets": ["Linear", "Conv2d"]}),
            "config_groups.group_0.targets in",
            "Conv2d",
        ),
        (FP8 | {"modules_to_not_convert": ["heads"]}, "modules_to_not_convert in", "heads"),
        (NVFP4 | {"ignore": ["model.layers.3*"]}, "the list of exceptions in", "model.layers.3*"),
        (NVFP4 | {"ignore": ["router"]}, "the list of exceptions in", "router"),
    ],
)
def test_an_entry_that_names_nothing(
    tmp_path: Path, config: dict[str, Any], where: str, entry: str
) -> None:
    path = directory(tmp_path, int8_tensors(GATE), config)
    text = failure(QuantizationConfigError, open_plan, path)
    assert text.splitlines()[0] == (
        f"{where} quantization_config of config.json names {entry!r}, and the model has no such"
        " module"
    )


def test_modules_that_are_computed_together_agree(tmp_path: Path) -> None:
    plan = open_plan(
        directory(
            tmp_path,
            int8_tensors(GATE) | {f"{UP}.weight": weight()},
            compressed(ignore=[UP]),
        )
    )
    lines = failure(QuantizationConfigError, plan.common_scheme, [GATE, UP]).splitlines()
    assert lines == [
        f"modules {GATE} and {UP} are computed together and stored differently",
        (
            f"  {GATE}: w8a8, because config_groups.group_0 in quantization_config of config.json"
            " says w8a8, written as int-quantized"
        ),
        f"  {UP}: float, because ignore in quantization_config of config.json lists it",
        (
            "  expected: one scheme for the projections that are fused, and for the experts of a"
            " layer"
        ),
        "  remedy: use a version of the model in which they agree",
    ]


def test_only_one_of_two_may_not_hold_a_scale_of_its_input(tmp_path: Path) -> None:
    tensors = float4_tensors(GATE) | float4_tensors(UP)
    del tensors[f"{UP}.input_scale"]
    plan = open_plan(directory(tmp_path, tensors, NVFP4))
    text = failure(QuantizationConfigError, plan.common_scheme, [GATE, UP])
    assert f"{GATE}: nvfp4 static input, because" in text
    assert f"{UP}: nvfp4, because" in text


def test_a_module_that_is_missing_is_reported_with_its_tensors(tmp_path: Path) -> None:
    path = directory(tmp_path, int8_tensors(GATE), compressed())
    plan = open_plan(path)
    scheme = plan.common_scheme([UP, GATE])
    assert scheme.scheme is WeightScheme.W8A8
    placements = [
        placement
        for module in (GATE, UP)
        for placement in plan.placements(module, allocate(scheme, N, K), scheme)
    ]
    tensors = CheckpointTensors(ModelDirectory.open(path).weight_files())
    text = failure(MissingTensorError, load_weights, tensors, placements)
    assert f"{UP}.weight (nearest in the checkpoint: {GATE}.weight)" in text
    assert f"{UP}.weight_scale (nearest" in text


@pytest.mark.parametrize(
    ("config", "tensors", "missing"),
    [
        (FP8, fp8_tensors, "weight_scale_inv"),
        (compressed(), int8_tensors, "weight_scale"),
        (NVFP4, float4_tensors, "weight_scale_2"),
        (compressed(FLOAT4_GROUP), compressed_float4_tensors, "input_global_scale"),
    ],
)
def test_scales_that_are_missing(
    tmp_path: Path, config: dict[str, Any], tensors: Callable[[str], Tensors], missing: str
) -> None:
    held = tensors(GATE)
    del held[f"{GATE}.{missing}"]
    text = failure(MissingTensorError, loaded, directory(tmp_path, held, config))
    assert f"{GATE}.{missing}" in text


NAN_BYTES = 0x7F
BREAKS: list[Case] = [
    (FP8, fp8_tensors, "weight_scale_inv", filled(float("nan")), ScaleError, "are NaN"),
    (FP8, fp8_tensors, "weight_scale_inv", filled(0), ScaleError, "are zero"),
    (FP8, fp8_tensors, "weight_scale_inv", filled(-1), ScaleError, "are negative"),
    (FP8, fp8_tensors, "weight_scale_inv", filled(float("inf")), ScaleError, "are infinite"),
    (
        FP8 | {"scale_fmt": "ue8m0"},
        fp8_tensors,
        "weight_scale_inv",
        filled(0.3),
        ScaleError,
        "1 of 1 values that are no powers of two, the first 0.3",
    ),
    (
        FP8,
        fp8_tensors,
        "weight_scale_inv",
        lambda t: t.reshape(1),
        TensorMismatchError,
        "weight_scale_inv is [1] in model.safetensors, expected [1, 1]",
    ),
    (
        FP8,
        fp8_tensors,
        "weight_scale_inv",
        lambda t: t.to(torch.int32),
        TensorMismatchError,
        "weight_scale_inv is int32, expected float32 or",
    ),
    (
        NVFP4,
        float4_tensors,
        "weight_scale",
        lambda t: torch.full(t.shape, NAN_BYTES, dtype=torch.uint8).view(t.dtype),
        ScaleError,
        "128 of 128 values are NaN",
    ),
    (NVFP4, float4_tensors, "weight_scale", filled(0), ScaleError, "are zero"),
    (
        NVFP4,
        float4_tensors,
        "weight_scale",
        lambda t: t.view(torch.uint8),
        TensorMismatchError,
        "weight_scale is uint8, placed into float8_e4m3fn",
    ),
    (NVFP4, float4_tensors, "weight_scale_2", filled(-1), ScaleError, "are negative"),
    (NVFP4, float4_tensors, "input_scale", filled(0), ScaleError, "are zero"),
    (
        NVFP4,
        float4_tensors,
        "weight",
        lambda t: t[:, :-1],
        QuantizationConfigError,
        "weight holds 62 columns, its weight_scale 4 blocks of 16",
    ),
    (
        compressed(FLOAT4_GROUP),
        compressed_float4_tensors,
        "weight_global_scale",
        filled(0),
        ScaleError,
        "are zero",
    ),
    (
        compressed(FLOAT4_GROUP),
        compressed_float4_tensors,
        "input_global_scale",
        filled(1e-40),
        ScaleError,
        f"1 / {GATE}.input_global_scale",
    ),
    (compressed(), int8_tensors, "weight_scale", filled(0), ScaleError, "are zero"),
    (
        compressed(),
        int8_tensors,
        "weight",
        lambda t: t.view(torch.uint8),
        TensorMismatchError,
        "weight is uint8, placed into int8",
    ),
    (
        compressed(),
        int8_tensors,
        "weight_scale",
        lambda t: t[:-1],
        TensorMismatchError,
        "weight_scale is [31, 1] in model.safetensors, expected [32, 1]",
    ),
    (compressed(int4_group()), int4_tensors, "weight_scale", filled(0), ScaleError, "are zero"),
    (
        compressed(int4_group()),
        int4_tensors,
        "weight_packed",
        lambda t: t[:, :-1],
        QuantizationConfigError,
        "weight_packed holds 56 columns, its weight_scale 64",
    ),
    (
        compressed(int4_group()),
        int4_tensors,
        "weight_packed",
        lambda t: t[:-1],
        TensorMismatchError,
        "weight_packed is [31, 8] in model.safetensors, expected [32, 8]",
    ),
    (
        compressed(int4_group()),
        int4_tensors,
        "weight_packed",
        lambda t: t.view(torch.uint8).reshape(N, -1)[:, : K // 8],
        TensorMismatchError,
        "weight_packed is uint8, placed into int32",
    ),
]


@pytest.mark.parametrize(
    ("config", "tensors", "leaf", "break_it", "error", "message"),
    BREAKS,
    ids=[f"{case[2]}-{case[5][:24]}" for case in BREAKS],
)
def test_bad_values_and_shapes_name_the_tensor(
    tmp_path: Path,
    config: dict[str, Any],
    tensors: Callable[[str], Tensors],
    leaf: str,
    break_it: Callable[[torch.Tensor], torch.Tensor],
    error: type[MortiseError],
    message: str,
) -> None:
    held = tensors(GATE)
    held[f"{GATE}.{leaf}"] = break_it(held[f"{GATE}.{leaf}"])
    text = failure(error, loaded, directory(tmp_path, held, config))
    assert f"{GATE}.{leaf}" in text
    assert message in text


@pytest.mark.parametrize("leaf", ["weight_zero_point", "weight_g_idx", "input_scale"])
def test_tensors_of_schemes_that_are_not_known(tmp_path: Path, leaf: str) -> None:
    held = int8_tensors(GATE) | {f"{GATE}.{leaf}": torch.ones(N, 1)}
    text = failure(QuantizationConfigError, loaded, directory(tmp_path, held, compressed()))
    assert text.startswith(f"tensor {GATE}.{leaf} belongs to a scheme that is not known here")


def test_a_quantised_checkpoint_that_says_nothing_is_explained(tmp_path: Path) -> None:
    path = directory(tmp_path, fp8_tensors(GATE))
    tensors = CheckpointTensors(ModelDirectory.open(path).weight_files())
    assert open_plan(path).scheme(GATE).scheme is WeightScheme.FLOAT
    text = failure(
        TensorMismatchError, load_weights, tensors, [Placement(f"{GATE}.weight", weight())]
    )
    assert "a quantised checkpoint must say how its projections are stored, in" in text
    assert "quantization_config of config.json" in text
