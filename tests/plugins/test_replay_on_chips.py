"""Recordings go from any backend to any other that serves the scheme, and nothing diverges."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from tests.engine.test_independent_models import quantised
from tests.fixtures.planted_faults import swapped_parts
from tests.fixtures.recorded_runs import recorded, replayed
from tests.fixtures.tiny_models import save_tiny

from mortise.recording.outcome import Verdict, sentence

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from mortise.recording.reader import Recording

    Model = Callable[[str], Path]

A5: dict[str, Any] = {"backend_options": {"npu_ascend": {"generation": "A5"}}}
FP8_KEYS = {"index_key_dtype": "fp8"}
LOW_LATENCY: dict[str, Any] = {
    "dispatch": {"mode": "low_latency", "max_tokens_per_rank": 64},
    "scheduler": {"max_num_batched_tokens": 64},
}
CHIPS = ("npu_ascend", "cuda_hopper", "cuda_blackwell")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A tiny model, whole or quantised, made when it is first asked for."""
    folder = tmp_path_factory.mktemp("models")
    made = {"plain": save_tiny(folder / "plain", moe_intermediate_size=64)}

    def get(scheme: str) -> Path:
        if scheme not in made:
            made[scheme] = quantised(made["plain"], folder / scheme, scheme)
        return made[scheme]

    return get


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Recording:
    folder = tmp_path_factory.mktemp("hybrid")
    layers = ["linear_attention", "full_attention"]
    path = save_tiny(
        folder / "model",
        model_type="qwen3_next",
        num_hidden_layers=2,
        layer_types=layers,
        moe_intermediate_size=64,
    )
    return recorded(path, folder / "recording", max_tokens=2)


def where(backend: str) -> dict[str, Any]:
    return {"backend": backend, "device": None if backend == "reference" else "emulated"}


@pytest.mark.parametrize(
    ("scheme", "settings", "asked", "options"),
    [
        ("plain", {"dtype": "float32"}, "npu_ascend", {}),
        ("plain", {"dtype": "float32"}, "cuda_hopper", {}),
        ("plain", {}, "npu_ascend", A5),
        ("w8a8", {}, "npu_ascend", A5),
        ("w8a8", LOW_LATENCY, "npu_ascend", {}),
        ("w8a8", {"dispatch": {"dtype": "bf16"}}, "npu_ascend", {}),
        ("w4a8", {}, "npu_ascend", {}),
        ("w4a8", {}, "npu_ascend", A5),
        ("w4a4", {}, "npu_ascend", {}),
        ("w4a16", {}, "npu_ascend", {}),
        ("w4a16", {}, "cuda_hopper", {}),
        ("fp8-block", FP8_KEYS, "cuda_hopper", {}),
        ("fp8-block", FP8_KEYS, "cuda_blackwell", {}),
        ("fp8-block", LOW_LATENCY, "cuda_hopper", {}),
        ("fp8-block", LOW_LATENCY, "cuda_blackwell", {}),
        ("fp8-block", {**where("cuda_blackwell")}, "reference", {}),
        ("fp8-block", {**where("cuda_blackwell")}, "cuda_hopper", {}),
        ("fp8-block", {**where("cuda_hopper")}, "cuda_blackwell", {}),
        ("plain", {**where("cuda_hopper")}, "npu_ascend", {}),
        ("w8a8", {**where("npu_ascend")}, "reference", {}),
    ],
)
def test_nothing_diverges(
    model: Model,
    tmp_path: Path,
    scheme: str,
    settings: dict[str, Any],
    asked: str,
    options: dict[str, Any],
) -> None:
    """Whatever format and layout rows have on either side."""
    recording = recorded(model(scheme), tmp_path / "recording", max_tokens=2, **settings)
    report = replayed(recording, **where(asked), **options)
    assert report.is_clean, sentence(report)
    assert Verdict.UNSUPPORTED not in {one.verdict for one in report.outcomes}


@pytest.mark.parametrize(
    ("chip", "scheme"),
    [("npu_ascend", "w4a8"), ("cuda_hopper", "fp8-block"), ("cuda_blackwell", "nvfp4")],
)
def test_an_emulated_chip_answers_its_own_recording_to_the_bit(
    model: Model, tmp_path: Path, chip: str, scheme: str
) -> None:
    path = tmp_path / "recording"
    recording = recorded(model(scheme), path, max_tokens=2, **where(chip))
    assert recording.header.backends["main"].emulated
    report = replayed(recording, **where(chip))
    assert {one.verdict for one in report.outcomes} <= {Verdict.SAME, Verdict.NOT_COMPARED}
    assert report.is_clean


@pytest.mark.parametrize("chip", CHIPS)
def test_a_split_that_mixes_up_its_parts_is_named(hybrid: Recording, chip: str) -> None:
    assert replayed(hybrid, **where(chip)).is_clean
    found = replayed(
        hybrid, **where(chip), fault=lambda ops: swapped_parts(ops, call=1)
    ).first_divergent
    assert found is not None
    assert (found.call.hook, found.call.layer) == ("qkv_split", "model.layers.0.linear_attn")


def test_a_scheme_that_a_chip_does_not_serve_is_said(model: Model, tmp_path: Path) -> None:
    recording = recorded(model("w4a4"), tmp_path / "recording", max_tokens=1)
    report = replayed(recording, **where("cuda_hopper"))
    notes = {one.note for one in report.outcomes if one.verdict is Verdict.UNSUPPORTED}
    assert notes
    assert all(note.startswith("not served: ") for note in notes)
    assert report.first_divergent is None
    assert "layers are not served" in sentence(report)
