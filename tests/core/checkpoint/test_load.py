from __future__ import annotations

import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from mortise.checkpoint import (
    CheckpointTensors,
    LoadReport,
    Placement,
    Skip,
    WeightFiles,
    load_weights,
    save_checkpoint,
)
from mortise.checkpoint.placement import Read, StoredForm
from mortise.errors import (
    MissingTensorError,
    ScaleError,
    TensorMismatchError,
    UnexpectedTensorError,
    WeightsError,
)


def checkpoint(path: Path, tensors: dict[str, torch.Tensor]) -> CheckpointTensors:
    save_file(tensors, path / "model.safetensors")
    return CheckpointTensors(WeightFiles(paths=(path / "model.safetensors",)))


def load_error(kind: type[WeightsError], *arguments: Any) -> list[str]:
    with pytest.raises(kind) as caught:
        load_weights(*arguments)
    assert type(caught.value) is kind
    return str(caught.value).splitlines()


def test_tensors_fill_parameters_and_views_of_them(tmp_path: Path) -> None:
    gate, up, norm = torch.randn(2, 3), torch.randn(2, 3), torch.randn(4)
    tensors = checkpoint(tmp_path, {"gate": gate, "up": up, "norm": norm, "extra": torch.ones(1)})
    fused = nn.Parameter(torch.zeros(4, 3))
    weight = nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))
    progress: list[tuple[str, int]] = []
    report = load_weights(
        tensors,
        [
            Placement("gate", fused[:2]),
            Placement("up", fused[2:]),
            Placement("norm", weight),
            Placement("bias", torch.zeros(3), optional=True),
        ],
        [Skip("ext", "only a part"), Skip("ext.*", "of no use"), Skip("extra", "never reached")],
        progress=lambda name, nbytes: progress.append((name, nbytes)),
    )
    assert torch.equal(fused, torch.cat([gate, up]))
    assert torch.equal(weight, norm.to(torch.bfloat16))
    assert fused.requires_grad
    assert fused.grad_fn is None
    assert set(report.placed) == {"gate", "up", "norm"}
    assert report.skipped == {"extra": "of no use"}
    assert report.absent == ("bias",)
    assert report.bytes == 2 * 24 + 16
    assert report.seconds > 0
    assert progress == [(name, 16 if name == "norm" else 24) for name in report.placed]


def test_one_tensor_can_fill_two_targets(tmp_path: Path) -> None:
    tensors = checkpoint(tmp_path, {"embed": torch.ones(2)})
    targets = [torch.zeros(2), torch.zeros(2)]
    report = load_weights(tensors, [Placement("embed", target) for target in targets])
    assert all(target.sum() == 2 for target in targets)
    assert report.placed == ("embed",)
    assert report.bytes == 8


def test_a_placed_tensor_is_not_skipped(tmp_path: Path) -> None:
    target = torch.zeros(1)
    report = load_weights(
        checkpoint(tmp_path, {"a": torch.ones(1)}), [Placement("a", target)], [Skip(".*", "all")]
    )
    assert target.item() == 1
    assert report.skipped == {}


def test_a_skip_matches_the_whole_name(tmp_path: Path) -> None:
    tensors = checkpoint(tmp_path, {"layers.1.a": torch.ones(1)})
    load_error(UnexpectedTensorError, tensors, [], [Skip(r"layers\.1", "part"), Skip("a", "part")])


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("target", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_floating_types_are_converted(
    tmp_path: Path, stored: torch.dtype, target: torch.dtype
) -> None:
    values = torch.randn(8).to(stored)
    destination = torch.zeros(8, dtype=target)
    load_weights(checkpoint(tmp_path, {"a": values}), [Placement("a", destination)])
    assert torch.equal(destination, values.to(target))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.int64], ids=str)
def test_the_same_dtype_is_copied_whatever_it_is(tmp_path: Path, dtype: torch.dtype) -> None:
    values = torch.tensor([1.0, 2.0, 4.0]).to(dtype)
    destination = torch.zeros(3).to(dtype)
    load_weights(checkpoint(tmp_path, {"a": values}), [Placement("a", destination)])
    assert torch.equal(destination.float(), values.float())


def test_missing_tensors(tmp_path: Path) -> None:
    tensors = checkpoint(tmp_path, {"layers.0.q_proj.weight": torch.ones(1)})
    placements = [
        Placement("layers.0.q_proj.weight", torch.zeros(1)),
        Placement("layers.1.q_proj.weight", torch.zeros(1)),
    ]
    assert load_error(MissingTensorError, tensors, placements) == [
        "the checkpoint lacks 1 tensor that the model needs",
        "    layers.1.q_proj.weight (nearest in the checkpoint: layers.0.q_proj.weight)",
        "  expected: every tensor of the model",
        (
            "  remedy: check that config.json and the safetensors files belong to the same model,"
            " and download them again if in doubt"
        ),
    ]


def test_a_tensor_that_is_optional_in_one_place_only_is_needed(tmp_path: Path) -> None:
    placements = [
        Placement("a", torch.zeros(1), optional=True),
        Placement("a", torch.zeros(1)),
        Placement("b", torch.zeros(1)),
    ]
    load_error(MissingTensorError, checkpoint(tmp_path, {"b": torch.ones(1)}), placements)


def test_unexpected_tensors(tmp_path: Path) -> None:
    tensors = checkpoint(tmp_path, {"layers.0.q_proj.weight": torch.ones(1), "zzz": torch.ones(1)})
    placements = [Placement("layers.0.q_proj.weight", torch.zeros(1))]
    lines = load_error(UnexpectedTensorError, tensors, placements)
    assert lines[:2] == ["the checkpoint holds 1 tensor that the model does not know", "    zzz"]
    assert lines[2] == (
        "  expected: only tensors that the model places, or that its list of skips explains"
    )
    assert lines[3].startswith("  remedy: check that config.json and the safetensors files belong")


def test_long_lists_are_shortened(tmp_path: Path) -> None:
    tensors = checkpoint(tmp_path, {f"t{number}": torch.ones(1) for number in range(13)})
    lines = load_error(UnexpectedTensorError, tensors, [])
    assert lines[0].startswith("the checkpoint holds 13 tensors")
    assert sum(line.startswith("    t") for line in lines) == 10
    assert "    and 3 more" in lines


def test_a_renamed_tensor_is_reported_from_both_sides(tmp_path: Path) -> None:
    tensors = checkpoint(tmp_path, {"layers.0.qproj.weight": torch.ones(1)})
    lines = load_error(
        MissingTensorError, tensors, [Placement("layers.0.q_proj.weight", torch.zeros(1))]
    )
    assert "    layers.0.q_proj.weight (nearest in the checkpoint: layers.0.qproj.weight)" in lines
    assert "  also: the checkpoint holds 1 tensor that the model does not know" in lines
    assert "    layers.0.qproj.weight (nearest expected: layers.0.q_proj.weight)" in lines


def test_the_nearest_name_is_found_among_very_many(tmp_path: Path) -> None:
    placements = [
        Placement(f"model.layers.{layer}.mlp.experts.{expert}.up_proj.weight", torch.zeros(1))
        for layer in range(100)
        for expert in range(100)
    ]
    tensors = checkpoint(tmp_path, {"model.layers.57.mlp.expert.31.up_proj.weight": torch.zeros(1)})
    lines = load_error(MissingTensorError, tensors, placements)
    assert (
        "    model.layers.57.mlp.expert.31.up_proj.weight"
        " (nearest expected: model.layers.57.mlp.experts.31.up_proj.weight)"
    ) in lines


def test_a_wrong_shape(tmp_path: Path) -> None:
    tensors = checkpoint(tmp_path, {"a": torch.ones(2, 3), "b": torch.ones(1)})
    placements = [Placement("a", torch.zeros(3, 2)), Placement("b", torch.zeros(()))]
    lines = load_error(TensorMismatchError, tensors, placements)
    assert lines[0] == "2 tensors in a shape that does not fit config.json"
    assert "    a is [2, 3] in model.safetensors, expected [3, 2]" in lines
    assert "    b is [1] in model.safetensors, expected []" in lines
    assert "  expected: the shapes that follow from config.json" in lines
    assert lines[-1].startswith("  remedy: check that config.json")


@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.int8, torch.float64], ids=str)
def test_a_dtype_that_cannot_be_placed(tmp_path: Path, stored: torch.dtype) -> None:
    tensors = checkpoint(tmp_path, {"a": torch.ones(2).to(stored), "a_scale_inv": torch.ones(1)})
    placements = [Placement("a", torch.zeros(2, dtype=torch.bfloat16))]
    name = str(stored).removeprefix("torch.")
    assert load_error(TensorMismatchError, tensors, placements) == [
        "1 tensor in a dtype that this model cannot place",
        f"    a is {name}, placed into bfloat16",
        "  also: the checkpoint holds 1 tensor that the model does not know",
        "    a_scale_inv",
        "  expected: bfloat16, float16 or float32, or exactly the dtype of the parameter",
        (
            "  remedy: a quantised checkpoint must say how its projections are stored, in"
            " quantization_config of config.json (ModelSlim: in quant_model_description.json):"
            " download these files too; embeddings, norms and routers are read unquantised only"
        ),
    ]


def doubled_with_offset(stored: torch.Tensor, read: Read) -> torch.Tensor:
    return 2 * stored.float() + read("offset")


def converted(name: str, target: torch.Tensor) -> Placement:
    """A placement of four bytes that also needs an offset of one float."""
    return Placement(
        name,
        target,
        stored=StoredForm(shapes=((4,), (4, 1)), dtypes=(torch.int8, torch.uint8)),
        convert=doubled_with_offset,
        also={"offset": StoredForm(shapes=((1,),), dtypes=(torch.float32,))},
    )


def test_a_target_can_be_made_of_several_stored_tensors(tmp_path: Path) -> None:
    values = torch.tensor([1, 2, 3, 4], dtype=torch.int8)
    tensors = checkpoint(tmp_path, {"a": values, "b": values + 1, "offset": torch.tensor([0.5])})
    first, second = torch.zeros(4), torch.zeros(4, dtype=torch.bfloat16)
    progress: list[tuple[str, int]] = []
    report = load_weights(
        tensors,
        [converted("a", first), converted("b", second)],
        progress=lambda name, nbytes: progress.append((name, nbytes)),
    )
    assert first.tolist() == [2.5, 4.5, 6.5, 8.5]
    assert second.tolist() == [4.5, 6.5, 8.5, 10.5]
    assert set(report.placed) == {"a", "b", "offset"}
    assert report.bytes == 4 + 4 + 4
    assert sorted(progress) == [("a", 4), ("b", 4), ("offset", 4)]


def test_what_a_conversion_expects_is_checked_before_anything_is_read(tmp_path: Path) -> None:
    tensors = watched(tmp_path, {"a": torch.ones(4), "b": torch.ones(5, dtype=torch.int8)})
    targets = [torch.zeros(4), torch.zeros(4)]
    lines = load_error(
        TensorMismatchError,
        tensors,
        [converted(name, target) for name, target in zip("ab", targets, strict=True)],
    )
    assert "    a is float32, expected int8 or uint8" in lines
    assert "    b is [5] in model.safetensors, expected [4] or [4, 1]" in lines
    assert "  also: the checkpoint lacks 1 tensor that the model needs" in lines
    assert "    offset" in lines
    assert tensors.reads == []


def test_tensors_that_conversions_read_along_are_checked_too(tmp_path: Path) -> None:
    values = torch.ones(4, dtype=torch.int8)
    tensors = watched(tmp_path, {"a": values, "offset": torch.ones(2, dtype=torch.int8)})
    lines = load_error(TensorMismatchError, tensors, [converted("a", torch.zeros(4))])
    assert "    offset is int8, expected float32" in lines
    assert "    offset is [2] in model.safetensors, expected [1]" in lines
    assert tensors.reads == []


def test_an_error_of_a_conversion_ends_the_load(tmp_path: Path) -> None:
    def refuse(stored: torch.Tensor, read: Read) -> torch.Tensor:
        raise ScaleError("scale a holds NaN")

    tensors = checkpoint(tmp_path, {"a": torch.ones(2)})
    lines = load_error(ScaleError, tensors, [Placement("a", torch.zeros(2), convert=refuse)])
    assert lines == ["scale a holds NaN"]


class WatchedTensors(CheckpointTensors):
    """Remembers what was read, and whether anything read before was still alive."""

    def __init__(self, files: WeightFiles) -> None:
        super().__init__(files)
        self.reads: list[str] = []
        self.alive: list[str] = []
        self._earlier: list[tuple[str, weakref.ref[torch.Tensor]]] = []

    def read(self, name: str) -> torch.Tensor:
        self.alive += [earlier for earlier, tensor in self._earlier if tensor() is not None]
        tensor = super().read(name)
        self.reads.append(name)
        self._earlier.append((name, weakref.ref(tensor)))
        return tensor


def watched(path: Path, tensors: dict[str, torch.Tensor]) -> WatchedTensors:
    save_file(tensors, path / "model.safetensors")
    return WatchedTensors(WeightFiles(paths=(path / "model.safetensors",)))


def test_one_tensor_is_alive_at_a_time_and_each_is_read_once(tmp_path: Path) -> None:
    values = {f"t{number}": torch.full((4,), float(number)) for number in range(6)}
    tensors = watched(tmp_path, values)
    targets = {name: torch.zeros(4) for name in values}
    load_weights(tensors, [Placement(name, target) for name, target in targets.items()])
    assert sorted(tensors.reads) == sorted(values)
    assert tensors.alive == []
    assert all(torch.equal(targets[name], values[name]) for name in values)


def test_the_watch_notices_a_tensor_that_is_kept(tmp_path: Path) -> None:
    tensors = watched(tmp_path, {"a": torch.ones(1), "b": torch.ones(1)})
    kept = tensors.read("a")
    tensors.read("b")
    assert tensors.alive == ["a"]
    assert kept.item() == 1


fates = st.sampled_from(
    ["right", "missing", "unexpected", "shape", "dtype", "skipped", "optional", "absent"]
)


@settings(
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    max_examples=60,
)
@given(plan=st.lists(fates, min_size=1, max_size=6))
def test_nothing_is_read_unless_everything_fits(tmp_path: Path, plan: list[str]) -> None:
    stored: dict[str, torch.Tensor] = {"always": torch.ones(1)}
    placements = [Placement("always", torch.zeros(1))]
    for number, fate in enumerate(plan):
        name = f"{fate}.{number}"
        if fate not in {"missing", "absent"}:
            shape = (2,) if fate == "shape" else (1,)
            dtype = torch.int8 if fate == "dtype" else torch.float32
            stored[name] = torch.ones(shape, dtype=dtype)
        if fate not in {"unexpected", "skipped"}:
            optional = fate in {"optional", "absent"}
            placements.append(Placement(name, torch.zeros(1), optional=optional))
    tensors = watched(tmp_path, stored)
    outcome: LoadReport | WeightsError
    try:
        outcome = load_weights(tensors, placements, [Skip(r"skipped\..*", "on purpose")])
    except WeightsError as error:
        outcome = error
    faults = {"missing", "unexpected", "shape", "dtype"} & set(plan)
    if faults:
        assert isinstance(outcome, WeightsError)
        assert tensors.reads == []
        assert all(placement.target.item() == 0 for placement in placements)
        named = [f"{fate}.{number}" for number, fate in enumerate(plan) if fate in faults]
        assert all(name in str(outcome) for name in named)
    else:
        assert isinstance(outcome, LoadReport)
        assert {*outcome.placed, *outcome.skipped} == set(stored)
        filled = [placement for placement in placements if placement.name in stored]
        assert all(placement.target.item() == 1 for placement in filled)


MEASURE = """
import sys
import torch
from mortise.checkpoint import CheckpointTensors, ModelDirectory, Placement, WeightFiles
from mortise.checkpoint import load_weights
from mortise.checkpoint import tensors as tensors_module

def peak_bytes():
    # Of this process alone; ru_maxrss would start at what the parent had used.
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

directory, mode = sys.argv[1:]
files = ModelDirectory.open(directory).weight_files()
if mode == "kept mapped":
    tensors_module.MAPPED_BYTES_LIMIT = 1 << 40
tensors = CheckpointTensors(files)
targets = {name: torch.empty(tensors.shape(name), dtype=tensors.dtype(name))
           for name in tensors.names()}
torch.zeros(1).copy_(torch.ones(1))
before = peak_bytes()
report = load_weights(tensors, [Placement(name, target) for name, target in targets.items()])
assert all(target.flatten()[-1] == 1 for target in targets.values())
print((peak_bytes() - before) / report.bytes)
"""


def growth(directory: Path, mode: str = "as shipped") -> float:
    """How much memory loading took, in multiples of the checkpoint's size."""
    child = subprocess.run(
        [sys.executable, "-c", MEASURE, str(directory), mode],
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stderr
    return float(child.stdout)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux to measure memory")
@pytest.mark.parametrize("max_shard_bytes", [1 << 40, 50 << 20], ids=["one file", "several files"])
def test_loading_never_holds_two_copies(tmp_path: Path, max_shard_bytes: int) -> None:
    ten_megabytes = torch.ones(10 << 18)
    tensors = {f"t{number}": ten_megabytes.clone() for number in range(20)}
    save_checkpoint(tmp_path, tensors, {}, max_shard_bytes)
    del tensors
    assert 0.95 < growth(tmp_path) < 1.5
    if max_shard_bytes == 1 << 40:
        assert growth(tmp_path, "kept mapped") > 1.9, "the measurement would notice a second copy"
