"""Emulated chips beside the reference on the built-in model: a fault is named where it is made."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from tests.cli.command_line import mortise
from tests.engine.test_independent_models import quantised
from tests.fixtures.planted_faults import (
    experts_answer,
    experts_without_last_row,
    larger_scale,
    one_percent_larger,
    page_off_by_one,
    projection_answer,
    swapped_gate_and_up,
    without_last_row,
)
from tests.fixtures.recorded_runs import recorded, replayed

from mortise.engine import binding
from mortise.recording.outcome import Verdict, sentence

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.fixtures.planted_faults import Fault

    from mortise.recording.reader import Recording

SCHEMES = {"npu_ascend": "w8a8", "cuda_hopper": "fp8-block", "cuda_blackwell": "nvfp4"}
"""What each chip serves; an Ascend has no float8, and a Hopper neither int8 nor float4 experts."""
PROMPT = list(range(100, 2500, 100))
LONG_PROMPT = [100 + number % 1000 for number in range(270)]
"""More than the 256 keys that the indexer of the built-in model picks, on five pages."""
MIDDLE = "layers:model.layers.1.*,model.layers.2.*"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path | str]:
    folder = tmp_path_factory.mktemp("models")
    copies = {scheme: quantised("builtin", folder / scheme, scheme) for scheme in SCHEMES.values()}
    return {"plain": "builtin", **copies}


@pytest.fixture(scope="module")
def recordings(
    models: dict[str, Path | str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Recording]:
    """Of two layers each; whoever has a fault in one has none in the other."""
    folder = tmp_path_factory.mktemp("recordings")
    return {
        name: recorded(model, folder / name, prompt=PROMPT, max_tokens=2, sample=[MIDDLE])
        for name, model in models.items()
    }


@pytest.fixture(scope="module")
def scores(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Recording]:
    """Of the indexer alone, by the dtype of its keys."""
    folder = tmp_path_factory.mktemp("scores")
    return {
        keys: recorded(
            "builtin",
            folder / keys,
            prompt=LONG_PROMPT,
            max_tokens=2,
            sample=["layers:*.self_attn"],
            index_key_dtype=keys,
            # The first pass has no key too many, and scores none.
            scheduler={"max_num_batched_tokens": 256},
        )
        for keys in ("compute", "fp8")
    }


def named(recording: Recording, chip: str, fault: Fault) -> tuple[str, str]:
    """Hook and layer of the first divergent call; calls before it were all compared."""
    report = replayed(recording, chip, "emulated", fault)
    first = report.first_divergent
    assert first is not None, sentence(report)
    assert f"call is {first.call.number}: {first.call.hook} of layer" in sentence(report)
    divergent = {
        (one.call.hook, one.call.layer)
        for one in report.outcomes
        if one.verdict is Verdict.DIVERGENT
    }
    # Every call has the recorded inputs, so that one fault is not seen in what comes after it.
    assert len(divergent) == 1, divergent
    return first.call.hook, first.call.layer


@pytest.mark.parametrize("kind", ["plain", "quantised"])
@pytest.mark.parametrize("chip", SCHEMES)
def test_nothing_diverges_where_nothing_is_wrong(
    models: dict[str, Path | str], chip: str, kind: str
) -> None:
    model = models["plain" if kind == "plain" else SCHEMES[chip]]
    backends = ("--backend", "reference", "--backend", chip, "--device", "emulated")
    outcome = mortise(
        "diff", "import os\ndef read(path):", *backends, "--model", model, "--max-tokens", "2",
        "--draft", "1",
    )  # fmt: skip
    assert outcome.code == 0, outcome.stdout
    assert outcome.stdout.splitlines()[-1].startswith("no call diverges (")
    assert "not served" not in outcome.stdout
    assert f"replayed: {chip} (" in outcome.stdout
    assert ", emulated)" in outcome.stdout
    rows = [line.split() for line in outcome.stdout.splitlines()]
    assert {"main", "draft"} <= {row[0] for row in rows if row}
    hooks = {row[1] for row in rows if len(row) > 2}
    assert ("quantized_linear" in hooks) is (kind == "quantised")


@pytest.mark.parametrize("chip", SCHEMES)
@pytest.mark.parametrize(
    "fault",
    [
        swapped_gate_and_up,
        experts_without_last_row,
        partial(experts_answer, change=one_percent_larger),
    ],
    ids=["swapped", "last-row", "one-percent"],
)
def test_a_fault_of_unquantised_experts_is_named(
    recordings: dict[str, Recording], chip: str, fault: Callable[[str], Fault]
) -> None:
    layer = "model.layers.2.mlp"
    assert named(recordings["plain"], chip, fault(layer)) == ("quantized_moe_apply", layer)


@pytest.mark.parametrize("chip", SCHEMES)
@pytest.mark.parametrize(
    ("fault", "hook", "layer"),
    [
        (swapped_gate_and_up, "quantized_moe_apply", "model.layers.1.mlp"),
        (larger_scale, "quantized_moe_apply", "model.layers.2.mlp"),
        (experts_without_last_row, "quantized_moe_apply", "model.layers.1.mlp"),
        (
            partial(projection_answer, change=without_last_row),
            "quantized_linear",
            "model.layers.1.self_attn.o_proj",
        ),
        (
            partial(projection_answer, change=one_percent_larger),
            "quantized_linear",
            "model.layers.2.self_attn.q_b_proj",
        ),
    ],
    ids=["swapped", "scale", "last-row", "projection-last-row", "projection-one-percent"],
)
def test_a_fault_of_quantised_layers_is_named(
    recordings: dict[str, Recording],
    chip: str,
    fault: Callable[[str], Fault],
    hook: str,
    layer: str,
) -> None:
    assert named(recordings[SCHEMES[chip]], chip, fault(layer)) == (hook, layer)


@pytest.mark.parametrize("keys", ["compute", "fp8"])
@pytest.mark.parametrize("chip", SCHEMES)
def test_a_page_off_by_one_is_named(scores: dict[str, Recording], chip: str, keys: str) -> None:
    """Also where the chip serves other keys than were recorded."""
    recording = scores[keys]
    assert replayed(recording, chip, "emulated").is_clean
    calls = [call for call in recording.calls if call.hook == "paged_mqa_logits"]
    layers = [call.layer for call in calls]
    assert layers[:4] == [f"model.layers.{number}.self_attn" for number in range(4)]
    fault: Any = partial(page_off_by_one, call=3)
    assert named(recording, chip, fault) == ("paged_mqa_logits", "model.layers.2.self_attn")


def test_diff_fails_and_names_the_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command itself, its second backend broken in one layer."""
    bind, layer = binding.bind_backend, "model.layers.3.mlp"

    def broken(*arguments: Any, **named: Any) -> Any:
        plant = experts_without_last_row(layer)
        return bind(*arguments, **{"wrap_ops": plant} | named)

    monkeypatch.setattr(binding, "bind_backend", broken)
    backends = ("--backend", "reference", "--backend", "npu_ascend", "--device", "emulated")
    arguments = ("diff", "import os", *backends, "--max-tokens", "1")
    outcome = mortise(*arguments)
    assert outcome.code == 1
    last = outcome.stdout.splitlines()[-1]
    assert f"quantized_moe_apply of layer {layer}, role main, pass 1 (prefill): " in last
    found = mortise(*arguments, "--json").document
    assert found["first_divergent"]["hook"] == "quantized_moe_apply"
    assert found["first_divergent"]["layer"] == layer
    assert found["first_divergent"]["row_error"] == pytest.approx(1.0)
    assert not found["clean"]
