"""Checkpoints in ModelSlim's published layout."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from tests.fixtures.loaded_checkpoints import load_all, open_plan, shapes_of
from tests.fixtures.modelslim_models import INPUT_OFFSET, INPUT_SCALE, save_modelslim
from tests.fixtures.tiny_models import save_tiny

from mortise.errors import MortiseError, QuantizationConfigError, ScaleError, TensorMismatchError
from mortise.formats.weights import dequantise_weight
from mortise.spec.weights import WeightScheme

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

EXPERT = "model.layers.1.mlp.experts.0.up_proj"
SHARED = "model.layers.1.mlp.shared_experts.down_proj"
NUM_EXPERTS = 3


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(
        tmp_path_factory.mktemp("float"),
        tokenizer=False,
        num_hidden_layers=2,
        n_routed_experts=NUM_EXPERTS,
        n_group=1,
    )


def projections(kind: str) -> Callable[[str], str]:
    """That type for all projections; head, embedding and router stay as they are."""

    def type_of(module: str) -> str:
        is_projection = module.endswith(("_proj", "_mqa", "wq_b", "wk"))
        return kind if is_projection else "FLOAT"

    return type_of


def mixed(module: str) -> str:
    if ".experts." in module:
        return "W4A8_DYNAMIC" if module.endswith("down_proj") else "W4A4_DYNAMIC"
    if ".shared_experts." in module:
        return "W8A8"
    return "W8A8_DYNAMIC" if ".layers.1." in module and "_proj" in module else "FLOAT"


@pytest.mark.parametrize(
    ("kind", "options", "scheme", "group_size"),
    [
        ("W8A8_DYNAMIC", {}, WeightScheme.W8A8, None),
        ("W8A8", {}, WeightScheme.W8A8, None),
        ("W8A8", {"deq_scale_bits": True}, WeightScheme.W8A8, None),
        ("W4A8_DYNAMIC", {"shards": True}, WeightScheme.W4A8, None),
        ("W4A8_DYNAMIC/staged", {}, WeightScheme.W4A8, 16),
        ("W4A8_DYNAMIC/staged packed", {}, WeightScheme.W4A8, 16),
        ("W4A4_DYNAMIC", {}, WeightScheme.W4A4, None),
        ("W4A4_DYNAMIC", {"group_size": 8}, WeightScheme.W4A4, 8),
    ],
)
def test_every_type_means_what_was_written(
    tmp_path: Path,
    original: Path,
    kind: str,
    options: dict[str, Any],
    scheme: WeightScheme,
    group_size: int | None,
) -> None:
    meant, _ = save_modelslim(tmp_path, original, projections(kind), **options)
    ours = load_all(tmp_path, shapes_of(original))
    assert len(meant) > 3 * NUM_EXPERTS
    plan = open_plan(tmp_path)
    for module, weight in meant.items():
        assert plan.scheme(module).scheme is scheme
        assert plan.scheme(module).group_size == group_size
        assert torch.equal(dequantise_weight(ours[module]), torch.from_numpy(weight)), module
    static = kind == "W8A8"
    for module in meant:
        scale, offset = ours[module].input_scale, ours[module].input_offset
        assert (scale is None) == (offset is None) == (not static)
        if scale is not None and offset is not None:
            assert scale.tolist() == [INPUT_SCALE]
            assert offset.tolist() == [INPUT_OFFSET]


def test_modules_of_all_types_in_one_checkpoint(tmp_path: Path, original: Path) -> None:
    meant, description = save_modelslim(tmp_path, original, mixed, shards=True)
    ours = load_all(tmp_path, shapes_of(original))
    for module, weight in meant.items():
        assert torch.equal(dequantise_weight(ours[module]), torch.from_numpy(weight)), module
    plain = load_file(original / "model.safetensors")
    floats = [name for name, stored in ours.items() if stored.scheme is WeightScheme.FLOAT]
    assert "model.layers.0.mlp.up_proj" in floats
    for module in floats:
        assert torch.equal(ours[module].weight, torch.from_numpy(plain[f"{module}.weight"]))
    kinds = Counter(kind for name, kind in description.items() if name.endswith(".weight"))
    assert set(kinds) == {"FLOAT", "W8A8", "W8A8_DYNAMIC", "W4A8_DYNAMIC", "W4A4_DYNAMIC"}


def test_w13_and_w2_may_differ_but_gate_and_up_may_not(tmp_path: Path, original: Path) -> None:
    save_modelslim(tmp_path, original, mixed)
    plan = open_plan(tmp_path)
    experts = [f"model.layers.1.mlp.experts.{number}" for number in range(NUM_EXPERTS)]
    first = [f"{expert}.{name}" for expert in experts for name in ("gate_proj", "up_proj")]
    assert plan.common_scheme(first).scheme is WeightScheme.W4A4
    second = [f"{expert}.down_proj" for expert in experts]
    assert plan.common_scheme(second).scheme is WeightScheme.W4A8
    with pytest.raises(QuantizationConfigError) as caught:
        plan.common_scheme([first[0], second[0]])
    text = str(caught.value)
    assert text.splitlines()[0] == (
        f"modules {first[0]} and {second[0]} are computed together and stored differently"
    )
    assert f"{first[0]}: w4a4, because quant_model_description.json gives" in text
    assert f"{second[0]}: w4a8, because" in text


def test_static_modules_of_old_versions_hold_the_scale_of_the_weight_too(
    tmp_path: Path, original: Path
) -> None:
    meant, _ = save_modelslim(tmp_path, original, projections("W8A8"))
    tensors = load_file(tmp_path / "quant_model_weights.safetensors")
    for module in meant:
        tensors[f"{module}.weight_scale"] = (tensors[f"{module}.deq_scale"] / INPUT_SCALE)[:, None]
        tensors[f"{module}.weight_offset"] = np.zeros((len(meant[module]), 1), np.float32)
    rewrite(tmp_path, tensors)
    ours = load_all(tmp_path, shapes_of(original))
    assert torch.equal(dequantise_weight(ours[SHARED]), torch.from_numpy(meant[SHARED]))
    tensors[f"{SHARED}.weight_scale"] *= np.float32(1.01)
    rewrite(tmp_path, tensors)
    error = failure(tmp_path, original, QuantizationConfigError)
    assert f"scale {SHARED}.weight_scale is not deq_scale / input_scale" in error


def test_a_bias_is_part_of_the_integer_bias(tmp_path: Path, original: Path) -> None:
    meant, _ = save_modelslim(tmp_path, original, projections("W8A8"))
    tensors = load_file(tmp_path / "quant_model_weights.safetensors")
    bias = np.linspace(-1, 1, len(meant[SHARED]), dtype=np.float32)
    tensors[f"{SHARED}.bias"] = bias
    rewrite(tmp_path, tensors)
    shapes = shapes_of(original) | {f"{SHARED}.bias": bias.shape}
    assert f"tensor {SHARED}.quant_bias differs" in failure(
        tmp_path, original, QuantizationConfigError, shapes
    )
    integers = tensors[f"{SHARED}.weight"].astype(np.float32).sum(axis=1) * INPUT_OFFSET
    tensors[f"{SHARED}.quant_bias"] = np.rint(
        bias / tensors[f"{SHARED}.deq_scale"] - integers
    ).astype(np.int32)
    rewrite(tmp_path, tensors)
    load_all(tmp_path, shapes)


def rewrite(path: Path, tensors: dict[str, Any], **description: Any) -> None:
    """Write other tensors, described as they were unless something else is said of them."""
    save_file(tensors, path / "quant_model_weights.safetensors")
    file = path / "quant_model_description.json"
    known = json.loads(file.read_text())
    facts = {name: kind for name, kind in known.items() if "." not in name}
    kinds = {name: known.get(name, "FLOAT") for name in tensors}
    file.write_text(json.dumps(facts | kinds | description))


def failure(
    path: Path,
    original: Path,
    kind: type[MortiseError],
    shapes: dict[str, tuple[int, ...]] | None = None,
) -> str:
    """The message that loading ends with."""
    with pytest.raises(kind) as caught:
        load_all(path, shapes or shapes_of(original))
    assert type(caught.value) is kind
    return str(caught.value)


def zeroed(tensors: dict[str, Any], name: str, at: int = 1) -> None:
    tensors[name][at] = 0


FAULTS: list[tuple[str, str, Callable[[dict[str, Any]], None], type[MortiseError], str]] = [
    (
        "an offset",
        "W8A8_DYNAMIC",
        lambda t: t[f"{EXPERT}.weight_offset"].fill(1),
        QuantizationConfigError,
        f"offset {EXPERT}.weight_offset is not zero",
    ),
    (
        "an offset of the second stage",
        "W4A8_DYNAMIC/staged",
        lambda t: t[f"{EXPERT}.weight_offset_second"].fill(1),
        QuantizationConfigError,
        f"offset {EXPERT}.weight_offset_second is not zero",
    ),
    (
        "a scale of zero",
        "W8A8_DYNAMIC",
        lambda t: zeroed(t, f"{EXPERT}.weight_scale"),
        ScaleError,
        f"scale {EXPERT}.weight_scale is unusable: 1 of 32 values are zero, the first at [1, 0]",
    ),
    (
        "a scale of zero over packed rows",
        "W4A8_DYNAMIC",
        lambda t: zeroed(t, f"{EXPERT}.weight_scale"),
        ScaleError,
        f"scale {EXPERT}.weight_scale is unusable: 1 of 32 values are zero",
    ),
    (
        "a scale of the second stage that is NaN",
        "W4A8_DYNAMIC/staged",
        lambda t: t[f"{EXPERT}.weight_scale_second"].fill(np.nan),
        ScaleError,
        f"scale {EXPERT}.weight_scale_second is unusable: 128 of 128 values are NaN",
    ),
    (
        "a negative static scale",
        "W8A8",
        lambda t: np.negative(t[f"{EXPERT}.deq_scale"], out=t[f"{EXPERT}.deq_scale"]),
        ScaleError,
        f"scale {EXPERT}.deq_scale is unusable: 32 of 32 values are negative",
    ),
    (
        "an input scale of zero",
        "W8A8",
        lambda t: t[f"{EXPERT}.input_scale"].fill(0),
        ScaleError,
        f"scale {EXPERT}.",
    ),
    (
        "an input offset that is infinite",
        "W8A8",
        lambda t: t[f"{EXPERT}.input_offset"].fill(np.inf),
        MortiseError,
        f"{EXPERT}.",
    ),
    (
        "an integer bias of something else",
        "W8A8",
        lambda t: t.update({f"{EXPERT}.quant_bias": t[f"{EXPERT}.quant_bias"] + 2}),
        QuantizationConfigError,
        f"tensor {EXPERT}.quant_bias differs from what weight and input_offset make of it in 32",
    ),
    (
        "values that are not int4",
        "W4A4_DYNAMIC",
        lambda t: t[f"{EXPERT}.weight"].fill(9),
        QuantizationConfigError,
        f"tensor {EXPERT}.weight holds 2048 values outside -8..7, the first 9",
    ),
    (
        "packed rows that are odd",
        "W4A8_DYNAMIC",
        lambda t: t.update({f"{EXPERT}.weight": t[f"{EXPERT}.weight"][:-1].copy()}),
        QuantizationConfigError,
        f"tensor {EXPERT}.weight has 15 rows and scales for 32",
    ),
    (
        "columns that words do not divide",
        "W4A8_DYNAMIC",
        lambda t: t.update({f"{EXPERT}.weight": t[f"{EXPERT}.weight"][:, :-1].copy()}),
        QuantizationConfigError,
        f"tensor {EXPERT}.weight has 63 columns and 1 scales to a row",
    ),
    (
        "columns that groups do not divide",
        "W4A4_DYNAMIC",
        lambda t: t.update({f"{EXPERT}.weight_scale": np.ones((32, 3), np.float32)}),
        QuantizationConfigError,
        f"tensor {EXPERT}.weight has 64 columns and 3 scales to a row",
    ),
    (
        "groups of int8",
        "W8A8_DYNAMIC",
        lambda t: t.update({f"{EXPERT}.weight_scale": np.ones((32, 2), np.float32)}),
        QuantizationConfigError,
        f"tensor {EXPERT}.weight has scales for 2 groups of columns",
    ),
    (
        "scales of other rows",
        "W8A8_DYNAMIC",
        lambda t: t.update({f"{EXPERT}.weight_scale": np.ones((31, 1), np.float32)}),
        TensorMismatchError,
        f"{EXPERT}.weight_scale is [31, 1] in quant_model_weights.safetensors, expected [32, 1]",
    ),
    (
        "scales of another dtype",
        "W8A8_DYNAMIC",
        lambda t: t.update({f"{EXPERT}.weight_scale": np.ones((32, 1), np.int32)}),
        TensorMismatchError,
        f"{EXPERT}.weight_scale is int32, expected float32 or bfloat16 or float16",
    ),
    (
        "static scales in words of more than 32 bits",
        "W8A8",
        lambda t: t.update({f"{EXPERT}.deq_scale": np.full(32, 1 << 46, np.int64)}),
        QuantizationConfigError,
        f"tensor {EXPERT}.deq_scale holds more than the 32 bits of a float",
    ),
    (
        "floats that are said to be quantised",
        "W8A8_DYNAMIC",
        lambda t: t.update({f"{EXPERT}.weight": t[f"{EXPERT}.weight"].astype(np.float32)}),
        QuantizationConfigError,
        f"tensor {EXPERT}.weight is float32, which contradicts what the checkpoint says of it",
    ),
]


@pytest.mark.parametrize(
    ("kind", "break_it", "error", "message"),
    [fault[1:] for fault in FAULTS],
    ids=[fault[0] for fault in FAULTS],
)
def test_what_is_wrong_names_the_tensor(
    tmp_path: Path,
    original: Path,
    kind: str,
    break_it: Callable[[dict[str, Any]], None],
    error: type[MortiseError],
    message: str,
) -> None:
    save_modelslim(tmp_path, original, projections(kind))
    tensors = load_file(tmp_path / "quant_model_weights.safetensors")
    break_it(tensors)
    rewrite(tmp_path, tensors)
    with pytest.raises(error) as caught:
        load_all(tmp_path, shapes_of(original))
    assert message in str(caught.value)


def test_a_scale_of_zero_is_right_over_zeros(tmp_path: Path, original: Path) -> None:
    save_modelslim(tmp_path, original, projections("W4A8_DYNAMIC"))
    tensors = load_file(tmp_path / "quant_model_weights.safetensors")
    zeroed(tensors, f"{EXPERT}.weight_scale")
    # The second row is the upper half of the first row of bytes.
    tensors[f"{EXPERT}.weight"][0] &= 0xF
    tensors[f"{EXPERT}.scale_bias"][1] = 0
    rewrite(tmp_path, tensors)
    weight = dequantise_weight(load_all(tmp_path, shapes_of(original))[EXPERT])
    assert weight[1].abs().sum() == 0
    assert weight[0].abs().sum() > 0


# The saver chooses by parts of the name: sums, 16 sums, and the product itself.
SCALE_BIAS = {EXPERT: 1, SHARED: 16, "model.layers.1.self_attn.kv_b_proj": None}


@pytest.mark.parametrize("kind", ["W4A8_DYNAMIC", "W4A8_DYNAMIC/staged packed"])
@pytest.mark.parametrize("module", SCALE_BIAS)
def test_a_scale_bias_of_another_weight(
    tmp_path: Path, original: Path, kind: str, module: str
) -> None:
    save_modelslim(tmp_path, original, projections(kind))
    load_all(tmp_path, shapes_of(original))
    tensors = load_file(tmp_path / "quant_model_weights.safetensors")
    sums, name = tensors[f"{module}.scale_bias"], f"{module}.scale_bias"
    rows, columns = len(sums), shapes_of(original)[f"{module}.weight"][1]
    assert sums.shape == (rows, SCALE_BIAS[module] or columns)
    right, wrong = float(sums[3, -1]), float(sums[3, -1]) * 1.5 + 1
    sums[3, -1] = wrong
    rewrite(tmp_path, tensors)
    lines = failure(tmp_path, original, QuantizationConfigError).splitlines()
    told = re.fullmatch(
        rf"tensor {re.escape(name)} differs from what weight and weight_scale make of it in 1 of"
        rf" {sums.size} values, the first at \[3, {sums.shape[1] - 1}\]: (\S+) instead of (\S+)",
        lines[0],
    )
    assert told is not None, lines[0]
    assert float(told[1]) == pytest.approx(wrong, rel=1e-5)
    assert float(told[2]) == pytest.approx(right, rel=0.05, abs=1e-2)


@pytest.mark.parametrize("kind", ["W4A8_DYNAMIC", "W4A8_DYNAMIC/staged packed"])
@pytest.mark.parametrize("module", SCALE_BIAS)
def test_scales_of_other_rows_are_found_by_their_sums(
    tmp_path: Path, original: Path, kind: str, module: str
) -> None:
    save_modelslim(tmp_path, original, projections(kind))
    tensors = load_file(tmp_path / "quant_model_weights.safetensors")
    tensors[f"{module}.weight_scale"] = tensors[f"{module}.weight_scale"][::-1].copy()
    rewrite(tmp_path, tensors)
    error = failure(tmp_path, original, QuantizationConfigError)
    assert error.startswith(f"tensor {module}.scale_bias differs from what weight")


@pytest.mark.parametrize(
    ("module", "change"),
    [
        # The product of old versions under w2 and w3, and sums under a name that has none now.
        (EXPERT, lambda weight: weight),
        (SHARED, lambda weight: weight),
        (SHARED, lambda weight: 8 * weight.sum(axis=1, keepdims=True, dtype=np.float64)),
        (EXPERT, lambda weight: 8 * weight.reshape(len(weight), 16, -1).sum(axis=-1)),
        (EXPERT, None),
    ],
    ids=["product", "product of 16", "one for 16", "16 for one", "none"],
)
def test_the_shape_of_scale_bias_decides_and_not_the_name(
    tmp_path: Path, original: Path, module: str, change: Callable[[Any], Any] | None
) -> None:
    meant, _ = save_modelslim(tmp_path, original, projections("W4A8_DYNAMIC"))
    tensors = load_file(tmp_path / "quant_model_weights.safetensors")
    before = tensors.pop(f"{module}.scale_bias")
    if change is not None:
        after = change(meant[module]).astype(np.float32)
        assert after.shape != before.shape
        tensors[f"{module}.scale_bias"] = after
    description = tmp_path / "quant_model_description.json"
    known = json.loads(description.read_text())
    known.pop(f"{module}.scale_bias")
    description.write_text(json.dumps(known))
    rewrite(tmp_path, tensors)
    ours = load_all(tmp_path, shapes_of(original))
    assert torch.equal(dequantise_weight(ours[module]), torch.from_numpy(meant[module]))


def test_a_scale_bias_in_another_shape(tmp_path: Path, original: Path) -> None:
    save_modelslim(tmp_path, original, projections("W4A8_DYNAMIC"))
    tensors = load_file(tmp_path / "quant_model_weights.safetensors")
    name = f"{EXPERT}.scale_bias"
    tensors[name] = tensors[name].repeat(2, axis=1)
    rewrite(tmp_path, tensors)
    error = failure(tmp_path, original, TensorMismatchError)
    assert f"{name} is [32, 2] in quant_model_weights.safetensors, expected [32, 1]" in error


def test_a_type_that_is_not_known(tmp_path: Path, original: Path) -> None:
    save_modelslim(tmp_path, original, projections("W8A8_DYNAMIC"))
    tensors = load_file(tmp_path / "quant_model_weights.safetensors")
    rewrite(tmp_path, tensors, **{f"{EXPERT}.weight": "W8A8_MXFP8"})
    assert failure(tmp_path, original, QuantizationConfigError).splitlines() == [
        f"quant_model_description.json: the type of {EXPERT}.weight is 'W8A8_MXFP8'",
        "  expected: one of FLOAT, W4A4_DYNAMIC, W4A8_DYNAMIC, W8A8, W8A8_DYNAMIC",
        (
            "  remedy: use a version of the model that is quantised in one of these ways, or"
            " unquantised"
        ),
    ]


def test_a_quantised_tensor_that_is_said_to_be_float(tmp_path: Path, original: Path) -> None:
    save_modelslim(tmp_path, original, projections("W8A8_DYNAMIC"))
    tensors = load_file(tmp_path / "quant_model_weights.safetensors")
    rewrite(tmp_path, tensors, **{f"{EXPERT}.weight": "FLOAT"})
    lines = failure(tmp_path, original, QuantizationConfigError).splitlines()
    assert lines[0].startswith(f"tensor {EXPERT}.weight is int8, which contradicts")
    assert lines[1] == "  quant_model_description.json gives it the type FLOAT"


def test_float_tensors_need_no_description(tmp_path: Path, original: Path) -> None:
    """The layers for multi-token prediction are often absent from it."""
    save_modelslim(tmp_path, original, mixed)
    file = tmp_path / "quant_model_description.json"
    known = json.loads(file.read_text())
    file.write_text(json.dumps({name: kind for name, kind in known.items() if kind != "FLOAT"}))
    load_all(tmp_path, shapes_of(original))
    assert open_plan(tmp_path).scheme("model.layers.0.mlp.up_proj").reason == (
        "quant_model_description.json does not name it"
    )


def test_quantised_tensors_need_a_description(tmp_path: Path, original: Path) -> None:
    save_modelslim(tmp_path, original, mixed)
    file = tmp_path / "quant_model_description.json"
    file.write_text("{}")
    assert re.match(
        r"tensor .+ is int8, which contradicts",
        failure(tmp_path, original, QuantizationConfigError),
    )


def test_an_entry_for_a_tensor_that_is_not_there(tmp_path: Path, original: Path) -> None:
    save_modelslim(tmp_path, original, mixed)
    tensors = load_file(tmp_path / "quant_model_weights.safetensors")
    entries = {"model.layers.7.mlp.up_proj.weight": "W8A8", "model.layers.0.quant_type": "INT8"}
    rewrite(tmp_path, tensors, **entries)
    assert failure(tmp_path, original, QuantizationConfigError).splitlines()[0] == (
        "quant_model_description.json names 'model.layers.7.mlp.up_proj.weight', and the model has"
        " no such tensor"
    )


def test_tensors_of_quantised_caches_and_attention_are_left(tmp_path: Path, original: Path) -> None:
    save_modelslim(tmp_path, original, mixed)
    tensors = load_file(tmp_path / "quant_model_weights.safetensors")
    extra = ["k_proj.kv_cache_scale", "v_proj.kv_cache_offset", "fa_q.scale", "fa_k.offset"]
    names = [f"model.layers.0.self_attn.{name}" for name in extra]
    tensors |= {name: np.ones(2, np.float32) for name in names}
    rewrite(tmp_path, tensors, **dict.fromkeys(names, "C8"))
    load_all(tmp_path, shapes_of(original))
    reasons = {skip.reason for skip in open_plan(tmp_path).skips()}
    assert len(reasons) == 2
