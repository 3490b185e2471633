"""The options of drafting: what each sets, and where one would be without an effect."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from mortise.checkpoint.directory import builtin_model_path
from tests.cli.command_line import failure, mortise

if TYPE_CHECKING:
    from pathlib import Path

OF_A_DRAFT = {
    "--draft-model": str(builtin_model_path()),
    "--draft-quantization": "none",
    "--draft-dispatch-dtype": "bf16",
}


def test_each_option_sets_its_key() -> None:
    arguments = [text for pair in OF_A_DRAFT.items() for text in pair]
    found = mortise("explain", "--json", "--draft", "2", *arguments).document["configuration"]
    shown = {key: row for key, row in found.items() if row["origin"].startswith("command line")}
    assert shown == {
        "draft.num_tokens": {"value": 2, "origin": "command line --draft"},
        "draft.model": {
            "value": str(builtin_model_path()),
            "origin": "command line --draft-model",
        },
        "draft.quantization": {"value": "none", "origin": "command line --draft-quantization"},
        "draft.dispatch_dtype": {"value": "bf16", "origin": "command line --draft-dispatch-dtype"},
    }


@pytest.mark.parametrize("verb", ["generate", "explain", "warmup", "eval"])
@pytest.mark.parametrize(("flag", "value"), OF_A_DRAFT.items())
def test_an_option_of_a_draft_that_there_is_not(verb: str, flag: str, value: str) -> None:
    message = failure(verb, flag, value)
    assert f"{flag} has no effect without --draft K or draft.num_tokens" in message


def test_several_options_of_a_draft_that_there_is_not() -> None:
    arguments = ("--draft-model", "x", "--draft-quantization", "none")
    message = failure("generate", "a", *arguments)
    assert "--draft-model and --draft-quantization have no effect without --draft K" in message


def test_drafting_may_be_asked_for_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "engine.toml"
    file.write_text("[draft]\nnum_tokens = 1\n", encoding="utf-8")
    outcome = mortise("explain", "--json", "--config", file, "--draft-quantization", "none")
    assert outcome.code == 0, outcome.stderr
    assert outcome.document["configuration"]["draft.num_tokens"]["value"] == 1


def test_drafting_may_be_switched_off_beside_its_options(tmp_path: Path) -> None:
    file = tmp_path / "engine.toml"
    file.write_text("[draft]\nnum_tokens = 2\n", encoding="utf-8")
    arguments = ("--config", file, "--draft", "0", "--draft-model", tmp_path / "missing")
    assert mortise("generate", "a", "--max-tokens", "1", *arguments).code == 0


@pytest.mark.parametrize(
    ("count", "expected"), [("-1", "an integer of at least 0"), ("17", "an integer of at most 16")]
)
def test_a_number_of_drafts_that_cannot_be(count: str, expected: str) -> None:
    message = failure("generate", "a", "--draft", count)
    assert f"'draft.num_tokens' is {count} (integer) (from command line --draft)" in message
    assert f"expected: {expected}\n" in message


def test_measuring_loads_no_draft(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("import os\n", encoding="utf-8")
    arguments = ("--draft", "2", "--draft-model", tmp_path / "missing")
    assert mortise("eval", text, "--window", "8", *arguments).code == 0
