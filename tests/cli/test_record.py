"""``record``, ``replay`` and ``diff`` as their users see them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from safetensors.torch import load_file

from tests.cli.command_line import failure, mortise
from tests.cli.test_documents import assert_documented

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("builtin")
TWICE = ("--backend", "reference", "--backend", "reference")


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    path = tmp_path / "recording"
    outcome = mortise("record", path, "def f(x):", "--max-tokens", "2")
    assert outcome.code == 0, outcome.stderr
    assert outcome.stdout.startswith(f"{path}: 20 of 20 hook calls, ")
    return path


def number_of(recording: Path, hook: str) -> int:
    lines = (recording / "calls.jsonl").read_text(encoding="utf-8").splitlines()
    return next(call["number"] for call in map(json.loads, lines) if call["hook"] == hook)


def test_record_prints_what_it_left_out(tmp_path: Path) -> None:
    arguments = ("record", tmp_path / "small", "def f(x):", "--max-tokens", "4")
    outcome = mortise(*arguments, "--sample", "first:1")
    assert outcome.code == 0
    assert "left out by --sample: " in outcome.stdout


def test_record_needs_no_prompt(tmp_path: Path) -> None:
    assert mortise("record", tmp_path / "run", "--max-tokens", "1").code == 0


def test_replay_shows_each_hook_and_one_sentence(recording: Path) -> None:
    outcome = mortise("replay", recording)
    assert outcome.code == 0
    lines = outcome.stdout.splitlines()
    assert lines[0].startswith("recorded: reference (mortise-core ")
    assert lines[1].startswith("replayed: reference (mortise-core ")
    assert lines[2].split()[:6] == ["role", "hook", "layer", "calls", "error", "allowed"]
    rows = [line.split() for line in lines[3:-1]]
    assert ["main", "quantized_moe_apply", "model.layers.2.mlp", "2", "0"] in [
        row[:5] for row in rows
    ]
    assert {row[-1] for row in rows} == {"same"}
    assert lines[-1].startswith("no call diverges (")


def test_one_call_is_shown_and_saved(recording: Path, tmp_path: Path) -> None:
    number = number_of(recording, "quantized_moe_apply")
    file = tmp_path / "call.safetensors"
    outcome = mortise("replay", recording, "--call", str(number), "--save", file)
    assert outcome.code == 0
    first = outcome.stdout.splitlines()[0]
    assert first == (
        f"call {number}: quantized_moe_apply of layer model.layers.1.mlp, role main,"
        " pass 1 (prefill)"
    )
    saved = load_file(file)
    assert set(saved) == {"rows", "the answer, recorded", "the answer, replayed"}
    assert saved["the answer, recorded"].equal(saved["the answer, replayed"])
    again = failure("replay", recording, "--call", str(number), "--save", file)
    assert "is there already" in again


@pytest.mark.parametrize(
    "hook", ["supports", "prepare_expert_weights", "create_token_dispatcher", "dispatch", "combine"]
)
def test_any_call_can_be_shown(recording: Path, hook: str) -> None:
    number = number_of(recording, hook)
    outcome = mortise("replay", recording, "--call", str(number))
    assert outcome.code == 0
    assert f"call {number}: {hook} of layer model.layers.1.mlp" in outcome.stdout


def test_the_documents_are_documented(recording: Path, tmp_path: Path) -> None:
    number = number_of(recording, "quantized_moe_apply")
    arguments = ("record", tmp_path / "other", "def f(x):", "--max-tokens", "2", "--json")
    assert_documented("record", mortise(*arguments, "--sample", "first:1").document)
    assert_documented("replay", mortise("replay", recording, "--json").document)
    diff = mortise("diff", "def f(x):", *TWICE, "--max-tokens", "1", "--json").document
    assert_documented("replay", diff)
    call = mortise("replay", recording, "--call", str(number), "--json").document
    assert_documented("replay --call", call)


def test_a_backend_of_the_configuration_is_asked(recording: Path, tmp_path: Path) -> None:
    file = tmp_path / "engine.toml"
    file.write_text("[backend_options.reference]\nnum_workers = 7\n", encoding="utf-8")
    assert mortise("replay", recording, "--config", file).code == 0
    assert "num_workers" in failure(
        "replay", recording, "--set", "backend_options.reference.num_workers=0"
    )


def test_diff_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    outcome = mortise("diff", "def f(x):", *TWICE, "--max-tokens", "1")
    assert outcome.code == 0, outcome.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("diff", "x"), "--backend is given 0 times, not twice"),
        (("diff", "x", *TWICE, "--backend", "reference"), "--backend is given 3 times"),
        (("diff", "x", *TWICE, *("--device", "cpu") * 3), "--device is given 3 times"),
        (("diff", "x", *TWICE, "--sample", "half"), "a sample of 'half'"),
        (("diff", "x", *TWICE, "--max-bytes", "much"), "a size of 'much'"),
        (("diff", "x", "--backend", "reference", "--backend", "nobody"), "nobody"),
        (("replay", "."), "is no recording"),
        (("replay", ".", "--save", "x"), "--save writes nothing without --call"),
    ],
)
def test_mistakes_are_one_message(arguments: tuple[str, ...], said: str) -> None:
    assert said in failure(*arguments)


def test_a_call_that_was_not_kept(recording: Path) -> None:
    assert "call 999 is not in the recording" in failure("replay", recording, "--call", "999")


def test_several_processes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mortise.cli import speaker
    from mortise.env import Launch

    launch = Launch(rank=0, world_size=2, local_rank=0, master_addr="", master_port=1)
    monkeypatch.setattr(speaker, "own_launch", lambda: launch)
    assert "a recording is of one" in failure("record", tmp_path / "run", "x")
    assert not list(tmp_path.iterdir())
