"""``mortise eval``: perplexity and bits per byte, for people and for programs."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING

import numpy as np
import pytest
from safetensors.numpy import save_file

from mortise import LLM
from mortise.evaluation import texts
from tests.cli.command_line import failure, mortise

if TYPE_CHECKING:
    from pathlib import Path

TEXT = "def f(x):\n    return x\n"


@pytest.fixture
def held_out(builtin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two held-out texts, and counts of a training in which every token was seen as often."""
    directory = tmp_path / "heldout"
    directory.mkdir()
    lines = [json.dumps({"path": name, "text": TEXT}) for name in ("a.py", "b.py")]
    (directory / "text.jsonl").write_text("\n".join(lines))
    counts = {
        "unigrams": np.full(272, 10, np.int32),
        "bigram_offsets": np.zeros(273, np.int32),
        "bigram_columns": np.zeros(1, np.uint16),
        "bigram_counts": np.zeros(1, np.uint16),
    }
    counts["bigram_offsets"][1:] = 1
    save_file(counts, directory / "ngrams.safetensors")
    monkeypatch.setattr(texts, "held_out_directory", lambda: directory)
    return directory


def test_the_held_out_texts_are_scored_beside_the_baselines(
    held_out: Path, tiny_model: Path
) -> None:
    document = mortise("eval", "--json").document
    llm = LLM(model=tiny_model)
    ids = [256, *llm.tokenizer.encode(TEXT, add_special_tokens=False), 257]
    logprobs = llm.logits(ids[:-1]).log_softmax(dim=-1)
    nats = -sum(float(logprobs[place, token]) for place, token in enumerate(ids[1:]))
    own, unigram, bigram = document["scores"]
    assert document["schema"] == 1
    assert (document["documents"], document["bytes"]) == (2, 2 * len(TEXT))
    assert (document["window"], document["stride"]) == (512, 512)
    assert own["predicted_tokens"] == 2 * (len(ids) - 1)
    assert own["nats_per_token"] == pytest.approx(nats / (len(ids) - 1), abs=1e-4)
    assert own["perplexity"] == pytest.approx(math.exp(own["nats_per_token"]))
    assert own["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(TEXT), abs=1e-3)
    assert (unigram["name"], bigram["name"]) == ("unigram", "bigram")
    # Every token but the first was counted as often.
    assert unigram["perplexity"] == pytest.approx(271)
    assert unigram["predicted_tokens"] == own["predicted_tokens"]


def test_the_table_names_text_and_windows(held_out: Path) -> None:
    outcome = mortise("eval", "--window", "64", "--stride", "16", "--documents", "1")
    assert outcome.code == 0
    lines = [" ".join(line.split()) for line in outcome.stdout.splitlines()]
    assert lines[0] == f"1 texts, {len(TEXT)} bytes, of {held_out / 'text.jsonl'}"
    assert lines[1].startswith("windows of 64 tokens, 16 apart; ")
    assert lines[3] == "model tokens predicted perplexity per token bits per byte"
    assert lines[4].startswith("tiny-v32 24 ")
    assert [line.split()[0] for line in lines[5:]] == ["unigram", "bigram"]


def test_another_model_stands_alone_on_a_text_of_ones_own(tiny_model: Path, tmp_path: Path) -> None:
    file = tmp_path / "own.txt"
    file.write_text(TEXT)
    document = mortise("eval", file, "--model", tiny_model, "--json").document
    assert [score["name"] for score in document["scores"]] == ["tiny-v32"]
    assert document["text"] == str(file)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--window", "513"], ["--window is 513", "from 1 to 512, the model's context"]),
        (["--window", "0"], ["--window is 0"]),
        (["--window", "8", "--stride", "9"], ["--stride is 9", "from 1 to 8, the window"]),
        (["--documents", "0"], ["--documents is 0"]),
        (["absent.txt"], ["the text 'absent.txt' cannot be read"]),
    ],
)
def test_wrong_options_are_named(held_out: Path, arguments: list[str], words: list[str]) -> None:
    message = failure("eval", *arguments)
    for word in words:
        assert word in message
