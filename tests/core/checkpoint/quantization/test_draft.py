"""A draft is decided module by module from its tensors, and what is not whole is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import pytest
import torch
from tests.fixtures.loaded_checkpoints import allocate
from tests.fixtures.quantised_modules import (
    FLOAT4,
    FLOAT4_GROUP,
    FP8,
    NVFP4,
    K,
    N,
    Tensors,
    compressed,
    compressed_float4_tensors,
    directory,
    float4_tensors,
    fp8_tensors,
    int4_group,
    int4_tensors,
    int8_tensors,
    weight,
)

from mortise.checkpoint import CheckpointTensors, ModelDirectory, load_weights
from mortise.checkpoint.quantization.configuration import CONFIG
from mortise.checkpoint.quantization.plan import QuantizationPlan
from mortise.errors import QuantizationConfigError
from mortise.formats.weights import dequantise_weight
from mortise.spec.weights import WeightScheme

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

LAYER = "model.layers.61"
GATE, UP, DOWN = (f"{LAYER}.mlp.experts.0.{name}_proj" for name in ("gate", "up", "down"))
REMEDY = (
    "leave draft.quantization at auto, which takes every module as it is stored, or name a model"
    " with an unquantised draft by draft.model"
)
ATTENTION = f"{LAYER}.self_attn.o_proj"

DIALECTS: dict[str, tuple[Any, Callable[[str], Tensors]]] = {
    "fp8": (FP8, fp8_tensors),
    "modelopt": (NVFP4, float4_tensors),
    "int8": (compressed(), int8_tensors),
    "int4": (compressed(int4_group()), int4_tensors),
    "float4": (compressed(FLOAT4_GROUP), compressed_float4_tensors),
}
SAYS = {
    "fp8": "quantization_config of config.json says fp8 and does not list it",
    "modelopt": "quantization_config of config.json says NVFP4 and does not exclude it",
    "int8": "config_groups.group_0 in quantization_config of config.json says w8a8, written as"
    " int-quantized",
    "int4": "config_groups.group_0 in quantization_config of config.json says w4a16, written as"
    " pack-quantized",
    "float4": "config_groups.group_0 in quantization_config of config.json says nvfp4, written as"
    " nvfp4-pack-quantized",
}


def described(kind: str, module: str) -> dict[str, Any]:
    """ModelSlim's description of one module."""
    return {"quant_model_description": {f"{module}.weight": kind}}


def int8_of_modelslim(module: str) -> Tensors:
    held = int8_tensors(module)
    return held | {f"{module}.weight_offset": torch.zeros(N, 1)}


def open_draft(path: Path, quantization: Literal["auto", "none"] = "auto") -> QuantizationPlan:
    opened = ModelDirectory.open(path)
    return QuantizationPlan.read_draft(
        opened, CheckpointTensors(opened.weight_files()), quantization
    )


def refused(plan: QuantizationPlan, *modules: str) -> str:
    with pytest.raises(QuantizationConfigError) as caught:
        plan.common_scheme(modules)
    assert caught.value.expected
    assert caught.value.remedy
    return str(caught.value)


def loaded(path: Path, module: str) -> torch.Tensor:
    """The weight of a module; every tensor beside it that is not skipped is an error."""
    opened = ModelDirectory.open(path)
    tensors = CheckpointTensors(opened.weight_files())
    plan = QuantizationPlan.read_draft(opened, tensors, "auto")
    scheme = plan.common_scheme([module])
    stored = allocate(scheme, N, K)
    load_weights(tensors, plan.placements(module, stored, scheme), plan.skips())
    return dequantise_weight(stored)


@pytest.mark.parametrize("quantization", ["auto", "none"])
def test_nothing_need_be_said_of_a_draft(
    tmp_path: Path, quantization: Literal["auto", "none"]
) -> None:
    plan = open_draft(directory(tmp_path, {f"{GATE}.weight": weight()}), quantization)
    assert plan.common_scheme([GATE]).scheme is WeightScheme.FLOAT
    assert plan.skips() == ()
    plan.check_names([])


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_floats_without_scales_are_floats_whatever_is_said(
    tmp_path: Path, dialect: str, dtype: torch.dtype
) -> None:
    config, make = DIALECTS[dialect]
    held = {f"{GATE}.weight": weight().to(dtype), f"{UP}.weight": weight().to(dtype)}
    plan = open_draft(directory(tmp_path, held | make(DOWN), config))
    scheme = plan.common_scheme([GATE, UP])
    name = str(dtype).removeprefix("torch.")
    reason = f"its weight is {name} without scales, though {SAYS[dialect]}"
    assert (scheme.scheme, scheme.dialect) == (WeightScheme.FLOAT, "")
    assert scheme.reason == reason
    # And beside it a quantised projection of the same experts.
    assert plan.common_scheme([DOWN]).scheme is not WeightScheme.FLOAT
    assert plan.notable() == {reason: 2}


@pytest.mark.parametrize("kind", ["W8A8_DYNAMIC", "W8A8", "a type of tomorrow"])
def test_floats_are_floats_whatever_the_description_says(tmp_path: Path, kind: str) -> None:
    path = directory(tmp_path, {f"{GATE}.weight": weight().bfloat16()}, **described(kind, GATE))
    assert open_draft(path).scheme(GATE).reason == (
        "its weight is bfloat16 without scales, though quant_model_description.json gives it the"
        f" type {kind}"
    )


@pytest.mark.parametrize(
    ("config", "files", "reason"),
    [
        (NVFP4 | {"ignore": [f"{LAYER}*"]}, {}, "quantization_config of config.json excludes it"),
        (
            FP8 | {"modules_to_not_convert": [LAYER]},
            {},
            "quantization_config of config.json lists it as not converted",
        ),
        (
            compressed(ignore=[f"re:{LAYER}.*"]),
            {},
            "ignore in quantization_config of config.json lists it",
        ),
        (
            compressed({"targets": ["re:model.layers.0.*"]}),
            {},
            "no target in quantization_config of config.json names it",
        ),
        (None, described("FLOAT", GATE), "quant_model_description.json gives it the type FLOAT"),
        (
            None,
            described("W8A8_DYNAMIC", UP),
            "quant_model_description.json does not name it",
        ),
    ],
)
def test_floats_of_which_the_checkpoint_says_so(
    tmp_path: Path, config: object, files: dict[str, Any], reason: str
) -> None:
    path = directory(tmp_path, {f"{GATE}.weight": weight().bfloat16()}, config, **files)
    plan = open_draft(path)
    assert plan.scheme(GATE).reason == reason
    assert not plan.notable()


@pytest.mark.parametrize(
    ("config", "make", "files"),
    [
        (NVFP4 | {"ignore": [f"{LAYER}*"]}, float4_tensors, {}),
        (FP8 | {"modules_to_not_convert": [LAYER]}, fp8_tensors, {}),
        (compressed(ignore=[f"re:{LAYER}.*"]), int8_tensors, {}),
        (None, int8_of_modelslim, described("FLOAT", GATE)),
        (None, int8_of_modelslim, described("W8A8_DYNAMIC", UP)),
    ],
)
def test_a_list_that_excepts_a_quantised_module_contradicts_it(
    tmp_path: Path, config: object, make: Callable[[str], Tensors], files: dict[str, Any]
) -> None:
    text = refused(open_draft(directory(tmp_path, make(GATE), config, **files)), GATE)
    assert text.startswith(f"tensor {GATE}.weight is ")
    assert ", which contradicts what the checkpoint says of it" in text


@pytest.mark.parametrize("dialect", DIALECTS)
def test_quantised_modules_are_read_as_their_dialect_says(tmp_path: Path, dialect: str) -> None:
    config, make = DIALECTS[dialect]
    found = loaded(directory(tmp_path, make(GATE), config), GATE)
    # A scheme of four bits is within a half of a seventh of the largest.
    assert (found - weight()).abs().max() < weight().abs().max() / 6


@pytest.mark.parametrize(
    ("dialect", "leaf"),
    [
        ("fp8", "weight_scale_inv"),
        ("modelopt", "weight_scale"),
        ("modelopt", "weight_scale_2"),
        ("int8", "weight_scale"),
        ("int4", "weight_scale"),
        ("float4", "weight_scale"),
        ("float4", "weight_global_scale"),
        ("float4", "input_global_scale"),
    ],
)
def test_a_quantised_weight_without_one_of_its_scales(
    tmp_path: Path, dialect: str, leaf: str
) -> None:
    config, make = DIALECTS[dialect]
    held = make(GATE)
    del held[f"{GATE}.{leaf}"]
    text = refused(open_draft(directory(tmp_path, held, config)), GATE)
    first = text.splitlines()[0]
    assert first.startswith(f"tensor {GATE}.weight")
    assert first.endswith(f"and the checkpoint lacks {GATE}.{leaf}")


@pytest.mark.parametrize(
    ("kind", "missing"),
    [
        ("W8A8_DYNAMIC", "weight_scale"),
        ("W4A4_DYNAMIC", "weight_scale"),
        ("W8A8", "deq_scale and {}.input_scale and {}.input_offset and {}.quant_bias"),
    ],
)
def test_int8_without_any_scale(tmp_path: Path, kind: str, missing: str) -> None:
    held = {f"{GATE}.weight": torch.ones(N, K, dtype=torch.int8)}
    text = refused(open_draft(directory(tmp_path, held, **described(kind, GATE))), GATE)
    assert text.splitlines()[0] == (
        f"tensor {GATE}.weight is int8, and the checkpoint lacks"
        f" {GATE}.{missing.replace('{}', GATE)}"
    )


@pytest.mark.parametrize("dialect", [*DIALECTS, "nothing said"])
@pytest.mark.parametrize(
    "leaf", ["weight_scale", "weight_scale_2", "weight_global_scale", "input_scale", "deq_scale"]
)
def test_floats_beside_scales(tmp_path: Path, dialect: str, leaf: str) -> None:
    config = DIALECTS[dialect][0] if dialect in DIALECTS else None
    held = {f"{GATE}.weight": weight().bfloat16(), f"{GATE}.{leaf}": torch.ones(1)}
    text = refused(open_draft(directory(tmp_path, held, config)), GATE)
    assert text.splitlines()[0] == (
        f"tensor {GATE}.weight is bfloat16, and the checkpoint holds {GATE}.{leaf} beside it"
    )


def test_scales_of_blocks_beside_floats(tmp_path: Path) -> None:
    """transformers writes scales that it never filled beside weights that blocks do not divide."""
    for rows, is_divided in ((96, False), (256, True)):
        held = {
            f"{GATE}.weight": weight(rows, 128).bfloat16(),
            f"{GATE}.weight_scale_inv": torch.ones(-(-rows // 128), 1),
        }
        plan = open_draft(directory(tmp_path / str(rows), held, FP8))
        if is_divided:
            assert f"{GATE}.weight_scale_inv beside it" in refused(plan, GATE)
        else:
            assert plan.scheme(GATE).scheme is WeightScheme.FLOAT
        none = open_draft(tmp_path / str(rows), "none")
        if is_divided:
            assert "1 module of model.layers.61 is stored quantised" in refused(none, GATE)
        else:
            assert none.scheme(GATE).scheme is WeightScheme.FLOAT


def test_scales_of_the_cache_say_nothing_of_the_weight(tmp_path: Path) -> None:
    module = f"{LAYER}.self_attn.k_proj"
    held = {f"{module}.weight": weight().bfloat16(), f"{module}.k_scale": torch.ones(1)}
    plan = open_draft(directory(tmp_path, held, NVFP4))
    assert plan.scheme(module).scheme is WeightScheme.FLOAT


def test_a_scale_without_its_weight(tmp_path: Path) -> None:
    held = {f"{GATE}.weight_scale": torch.ones(N, 1)}
    text = refused(open_draft(directory(tmp_path, held, compressed())), GATE)
    assert text.splitlines()[0] == (
        f"tensor {GATE}.weight_scale is float32, and the checkpoint lacks {GATE}.weight"
    )


def test_modules_of_which_nothing_is_stored_are_no_error_of_the_plan(tmp_path: Path) -> None:
    held = fp8_tensors(GATE) | {f"{UP}.bias": torch.ones(N)}
    plan = open_draft(directory(tmp_path, held, FP8))
    assert plan.scheme(DOWN).reason == "the checkpoint holds no tensor of it"
    assert plan.scheme(UP).reason == "the checkpoint holds no weight of it"


def test_projections_that_are_computed_together_have_to_agree(tmp_path: Path) -> None:
    held = fp8_tensors(GATE) | {f"{UP}.weight": weight().bfloat16()}
    text = refused(open_draft(directory(tmp_path, held, FP8)), GATE, UP)
    assert text.splitlines() == [
        f"modules {GATE} and {UP} are computed together and stored differently",
        f"  {GATE}: fp8_block, because {CONFIG} says fp8 in blocks of 128 x 128",
        f"  {UP}: float, because its weight is bfloat16 without scales, though {SAYS['fp8']}",
        "  expected: one scheme for the projections that are fused, and for the experts of a layer",
        "  remedy: use a version of the model in which they agree",
    ]


def test_weights_alone_may_be_float4(tmp_path: Path) -> None:
    """Where the inputs of the draft were never seen, no scale of theirs is stored."""
    config = compressed(
        {"weights": FLOAT4, "input_activations": None} | {"format": "nvfp4-pack-quantized"}
    )
    held = compressed_float4_tensors(GATE)
    del held[f"{GATE}.input_global_scale"]
    path = directory(tmp_path / "compressed-tensors", held, config)
    other = float4_tensors(GATE)
    del other[f"{GATE}.input_scale"]
    same = directory(tmp_path / "modelopt", other, NVFP4)
    for one in (path, same):
        scheme = open_draft(one).scheme(GATE)
        assert (scheme.scheme, scheme.static_input) == (WeightScheme.NVFP4, False)
    torch.testing.assert_close(loaded(path, GATE), loaded(same, GATE), rtol=2**-22, atol=0)


@pytest.mark.parametrize("make", [fp8_tensors, int4_tensors])
def test_quantised_modules_of_which_nothing_is_said(
    tmp_path: Path, make: Callable[[str], Tensors]
) -> None:
    text = refused(open_draft(directory(tmp_path, make(GATE))), GATE)
    first = text.splitlines()[0]
    assert first.startswith(f"tensor {GATE}.weight")
    assert f"beside {GATE}.weight_scale" in first
    assert first.endswith("and nothing says how the draft is quantised")


def test_lists_may_name_modules_of_the_model_that_the_draft_was_made_for(tmp_path: Path) -> None:
    config = NVFP4 | {"ignore": ["model.layers.3.self_attn*", "vision_tower"]}
    plan = open_draft(directory(tmp_path, float4_tensors(GATE), config))
    plan.check_names([GATE])


UNREADABLE: list[tuple[object, dict[str, Any]]] = [
    ({"quant_method": "a method of tomorrow"}, {}),
    ({"quant_method": "fp8"}, {}),
    (["fp8"], {}),
    (NVFP4 | {"quant_algo": "MIXED_PRECISION"}, {}),
    (compressed({"weights": {"num_bits": 3}}), {}),
    (FP8, {"hf_quant_config": {}}),
    (None, {"quant_model_description_a": {}, "quant_model_description_b": {}}),
    (None, {"hf_quant_config": []}),
]


@pytest.mark.parametrize(("config", "files"), UNREADABLE)
def test_an_unquantised_draft_needs_nothing_that_is_said(
    tmp_path: Path, config: object, files: dict[str, Any]
) -> None:
    held = {f"{GATE}.weight": weight().bfloat16(), f"{UP}.weight": weight().bfloat16()}
    plan = open_draft(directory(tmp_path, held, config, **files), "none")
    scheme = plan.common_scheme([GATE, UP])
    assert scheme.scheme is WeightScheme.FLOAT
    assert scheme.reason == "draft.quantization is none"
    assert plan.notable() == {"draft.quantization is none": 2}
    plan.check_names([GATE])


@pytest.mark.parametrize(("config", "files"), UNREADABLE[:-1])
def test_what_is_said_has_to_be_known_otherwise(
    tmp_path: Path, config: object, files: dict[str, Any]
) -> None:
    path = directory(tmp_path, {f"{GATE}.weight": weight()}, config, **files)
    with pytest.raises(QuantizationConfigError) as caught:
        open_draft(path)
    assert caught.value.remedy is not None
    assert caught.value.remedy.endswith(
        "if its draft is unquantised, say so: draft.quantization none"
    )


def test_none_is_an_error_where_a_module_is_quantised(tmp_path: Path) -> None:
    held = fp8_tensors(GATE) | fp8_tensors(UP) | fp8_tensors(DOWN) | int4_tensors(ATTENTION)
    held |= {"model.layers.60.mlp.up_proj.weight": fp8_tensors(UP)[f"{UP}.weight"]}
    held |= {f"{LAYER}.eh_proj.weight": weight().bfloat16()}
    path = directory(tmp_path, held, {"quant_method": "a method of tomorrow"})
    plan = open_draft(path, "none")
    assert plan.scheme(f"{LAYER}.eh_proj").scheme is WeightScheme.FLOAT
    assert refused(plan, GATE, UP).splitlines() == [
        "draft.quantization is none, and 4 modules of model.layers.61 are stored quantised",
        f"  {GATE}.weight is float8_e4m3fn, beside {GATE}.weight_scale_inv",
        f"  {DOWN}.weight is float8_e4m3fn, beside {DOWN}.weight_scale_inv",
        f"  {UP}.weight is float8_e4m3fn, beside {UP}.weight_scale_inv",
        "  and 1 more",
        "  expected: a draft in bfloat16, float16 or float32, without scales",
        f"  remedy: {REMEDY}",
    ]


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("name", ["mtp.layers.0.mlp.up_proj", "mtp.fc", "joined"])
def test_none_names_modules_whatever_they_are_called(
    tmp_path: Path, dialect: str, name: str
) -> None:
    config, make = DIALECTS[dialect]
    text = refused(open_draft(directory(tmp_path, make(name), config), "none"), name)
    where = "mtp" if name.startswith("mtp.") else "joined"
    assert text.startswith(f"draft.quantization is none, and 1 module of {where} ")
    assert f"  {name}.weight" in text


def test_none_is_an_error_where_scales_are_left_beside_floats(tmp_path: Path) -> None:
    held = {f"{GATE}.weight": weight().bfloat16(), f"{GATE}.weight_scale": torch.ones(N, 1)}
    text = refused(open_draft(directory(tmp_path, held), "none"), GATE)
    assert f"{GATE}.weight is bfloat16, beside {GATE}.weight_scale" in text
