"""``mortise eval --schemes`` and ``--against``: what quantising costs, compared exactly."""

from __future__ import annotations

import json
import math
import tempfile
import xml.etree.ElementTree as ET
from typing import TYPE_CHECKING, Any

import pytest

from mortise.cli import eval_schemes
from mortise.env import Launch
from mortise.evaluation import divergence
from tests.cli.command_line import failure, mortise
from tests.fixtures.tiny_models import save_tiny

if TYPE_CHECKING:
    from pathlib import Path

TEXT = "def f(x):\n    return x + 1\n" * 12
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "own.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary directories are made."""
    path = tmp_path / "scratch"
    path.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(path))
    return path


def compared(*arguments: str | Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The reference, and what was compared with it by name."""
    document = mortise("eval", *arguments, "--window", "64", "--json").document
    reference, *others = document["scores"]
    assert reference["comparison"] is None
    return reference, {other["name"]: other for other in others}


def test_schemes_are_compared_on_the_same_windows(
    text: Path, tiny_model: Path, scratch: Path
) -> None:
    schemes = ("bf16", "fp8-block", "w8a8", "w4a8", "w4a16", "w4a4")
    reference, others = compared(text, "--model", tiny_model, "--schemes", ",".join(schemes))
    assert list(others) == list(schemes)
    (alone,) = mortise("eval", text, "--model", tiny_model, "--window", "64", "--json").document[
        "scores"
    ]
    assert reference["perplexity"] == pytest.approx(alone["perplexity"], rel=1e-6)
    assert reference["bits_per_weight"] == 32
    for other in others.values():
        comparison = other["comparison"]
        assert comparison["windows"] == 6
        assert other["predicted_tokens"] == reference["predicted_tokens"] == len(TEXT) + 1
        excess = other["nats_per_token"] - reference["nats_per_token"]
        assert comparison["excess_nats_per_token"]["mean"] == pytest.approx(excess, abs=1e-9)
        assert other["perplexity"] == pytest.approx(math.exp(other["nats_per_token"]))
        assert comparison["kl_nats_per_token"]["standard_error"] > 0
        assert 0 < comparison["top1_agreement"]["mean"] <= 1
        bits = 32 * other["weight_bytes"] / reference["weight_bytes"]
        assert other["bits_per_weight"] == pytest.approx(bits)
    divergences = {
        name: other["comparison"]["kl_nats_per_token"]["mean"] for name, other in others.items()
    }
    assert 0 < divergences["bf16"] < divergences["w4a4"]
    assert divergences["w8a8"] < divergences["w4a8"] < divergences["w4a4"]
    assert others["bf16"]["bits_per_weight"] == 16
    assert others["w4a16"]["weight_bytes"] < others["w8a8"]["weight_bytes"]
    assert list(scratch.iterdir()) == []


def test_a_scheme_that_changes_nothing_changes_nothing(text: Path, tiny_model: Path) -> None:
    _, others = compared(text, "--model", tiny_model, "--dtype", "bfloat16", "--schemes", "bf16")
    comparison = others["bf16"]["comparison"]
    nothing = {"mean": 0.0, "standard_error": 0.0}
    assert comparison["kl_nats_per_token"] == nothing
    assert comparison["excess_nats_per_token"] == nothing
    assert comparison["top1_agreement"] == {"mean": 1.0, "standard_error": 0.0}


def test_a_scheme_is_what_quantize_writes(text: Path, tiny_model: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    assert mortise("quantize", copy, "--model", tiny_model, "--scheme", "w4a16").code == 0
    _, others = compared(
        text,
        "--model",
        tiny_model,
        "--schemes",
        "w4a16",
        "--against",
        copy,
        "--against",
        tiny_model,
    )
    assert list(others) == ["w4a16", "copy", "tiny-v32"]
    assert others["copy"] | {"name": "w4a16"} == others["w4a16"]
    assert others["tiny-v32"]["comparison"]["kl_nats_per_token"]["mean"] == 0.0


def test_directories_of_one_name_are_told_apart(
    text: Path, tiny_model: Path, tmp_path: Path
) -> None:
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "w8a8").symlink_to(tiny_model)
    places = [str(tmp_path / place / "w8a8") for place in ("a", "b")]
    _, others = compared(
        text,
        "--model",
        tiny_model,
        "--against",
        places[0],
        "--against",
        places[1],
        "--against",
        f"{places[1]}/",
    )
    assert list(others) == places


def test_a_quantised_model_can_be_what_others_are_compared_with(
    text: Path, tiny_model: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    mortise("quantize", copy, "--model", tiny_model, "--scheme", "w8a8")
    reference, others = compared(text, "--model", copy, "--against", tiny_model)
    assert (reference["name"], reference["bits_per_weight"]) == ("copy", None)
    assert others["tiny-v32"]["comparison"]["kl_nats_per_token"]["mean"] > 0


def test_the_table_tells_how_sure_it_is(text: Path, tiny_model: Path) -> None:
    outcome = mortise("eval", text, "--model", tiny_model, "--schemes", "w8a8", "--window", "64")
    assert outcome.code == 0
    lines = [" ".join(line.split()) for line in outcome.stdout.splitlines()]
    assert lines[0] == f"1 texts, {len(TEXT)} bytes, of {text}"
    assert lines[1].startswith("windows of 64 tokens, 64 apart; reference on cpu, float32; ")
    assert lines[3] == "model bytes bits/weight perplexity bits/byte same top-1 KL, nats"
    assert lines[4].startswith("tiny-v32 ")
    name, _, bits, _, plus_minus, *_, divergence_mean, _, error = lines[5].split()
    assert (name, plus_minus) == ("w8a8", "±")
    assert 8 < float(bits) < 32
    assert 0 < float(error) < float(divergence_mean)
    assert lines[-1] == (
        f"{len(TEXT) + 1} tokens predicted, each compared with tiny-v32; ± is one standard error"
        " over 6 windows, of the perplexity that of its difference"
    )


def test_one_window_tells_no_error(text: Path, tiny_model: Path) -> None:
    arguments = ("eval", text, "--model", tiny_model, "--schemes", "w8a8", "--window", "512")
    assert "±" not in mortise(*arguments).stdout
    document = mortise(*arguments, "--json").document
    comparison = document["scores"][1]["comparison"]
    assert comparison["windows"] == 1
    assert comparison["kl_nats_per_token"]["standard_error"] is None


def test_a_plot_shows_every_row(text: Path, tiny_model: Path, tmp_path: Path) -> None:
    plot = tmp_path / "schemes.svg"
    outcome = mortise(
        "eval",
        text,
        "--model",
        tiny_model,
        "--schemes",
        "w8a8,w4a4",
        "--window",
        "64",
        "--plot",
        plot,
        "--json",
    )
    texts = [found.text for found in ET.parse(plot).getroot().iter(f"{SVG}text")]
    for other in outcome.document["scores"][1:]:
        assert other["name"] in texts
        assert f"{other['perplexity']:.2f}" in texts
        assert f"{other['comparison']['kl_nats_per_token']['mean']:.2g}" in texts
    assert f"tiny-v32 on reference, float32: 1 texts, {len(TEXT) + 1} tokens" in texts


def test_all_leaves_out_what_cannot_be_had_and_says_why(
    text: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, scratch: Path
) -> None:
    monkeypatch.setattr(eval_schemes, "SCHEMES", ("bf16", "fp8-block", "w8a8"))
    arguments = ("eval", text, "--model", tiny_model, "--dispatch-dtype", "fp8")
    outcome = mortise(*arguments, "--schemes", "all", "--json")
    assert [score["name"] for score in outcome.document["scores"][1:]] == ["bf16", "fp8-block"]
    (left,) = outcome.document["left_out"]
    assert left["name"] == "w8a8"
    assert "cannot consume fp8 rows" in left["reason"]
    assert outcome.stderr.count("warning: w8a8 is left out: ") == 1
    # Who names a scheme wants it.
    assert "cannot consume fp8 rows" in failure(*arguments, "--schemes", "bf16,w8a8")
    monkeypatch.setattr(eval_schemes, "SCHEMES", ("w8a8",))
    assert "cannot consume fp8 rows" in failure(*arguments, "--schemes", "all")
    assert list(scratch.iterdir()) == []


def test_the_reference_stays_the_same_whatever_is_dispatched(text: Path, tiny_model: Path) -> None:
    arguments = (text, "--model", tiny_model, "--schemes", "bf16,w8a8")
    reference, others = compared(*arguments)
    same, differing = compared(*arguments, "--dispatch-dtype", "int8")
    assert same == reference
    assert differing["bf16"] == others["bf16"]


def test_news_of_several_models_is_told_once(text: Path, tiny_model: Path, tmp_path: Path) -> None:
    config = tmp_path / "engine.toml"
    config.write_text("[backend_options.elsewhere]\nstreams = 2\n")
    arguments = ("eval", text, "--model", tiny_model, "--config", config)
    outcome = mortise(*arguments, "--schemes", "bf16,w8a8")
    assert outcome.stderr.count("backend_options.elsewhere is for a backend") == 1


def test_a_model_that_breaks_is_not_hidden(
    text: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> divergence.Divergence:
        return divergence.Divergence(64, 100.0, math.nan, math.inf, 0)

    monkeypatch.setattr("mortise.evaluation.comparison.divergence", broken)
    arguments = ("eval", text, "--model", tiny_model, "--schemes", "bf16", "--window", "64")
    document = mortise(*arguments, "--json").document
    assert document["scores"][1]["perplexity"] is None
    assert document["scores"][1]["comparison"]["kl_nats_per_token"]["mean"] is None
    plot = tmp_path / "a.png"
    shown = mortise(*arguments, "--plot", plot).stdout
    assert "nan" in shown
    assert "inf" in shown
    assert plot.is_file()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--schemes", "w8a9,bf16"], ["--schemes names 'w8a9'", "bf16, fp8-block, w8a8"]),
        (["--schemes", ","], ["--schemes names none"]),
        (["--schemes", "all,w8a8"], ["--schemes names 'all'"]),
        (["--plot", "a.svg"], ["--plot draws nothing without --schemes or --against"]),
        (["--schemes", "w8a8", "--plot", "a.pdf"], ["ends in .svg or .png"]),
        (["--against", "absent"], ["absent' does not exist"]),
    ],
)
def test_wrong_options_are_named(
    text: Path, tiny_model: Path, arguments: list[str], words: list[str]
) -> None:
    message = failure("eval", text, "--model", tiny_model, *arguments)
    for word in words:
        assert word in message


def test_a_quantised_model_is_not_quantised_again(
    text: Path, tiny_model: Path, tmp_path: Path
) -> None:
    mortise("quantize", tmp_path / "copy", "--model", tiny_model, "--scheme", "w8a8")
    for scheme in ("bf16", "w4a4"):
        message = failure("eval", text, "--model", tmp_path / "copy", "--schemes", scheme)
        assert "is quantised already" in message


def test_models_of_other_tokens_are_not_compared(
    text: Path, tiny_model: Path, tmp_path: Path
) -> None:
    larger = save_tiny(tmp_path / "larger", vocab_size=280)
    shorter = save_tiny(tmp_path / "shorter", max_position_embeddings=32)
    merged = save_tiny(tmp_path / "merged")
    file = merged / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["model"]["merges"] = [["d", "e"]]
    tokenizer["model"]["vocab"]["de"] = 258
    file.write_text(json.dumps(tokenizer))
    for other, words in (
        (larger, "its vocabulary has 280 tokens, the other 272"),
        (shorter, "its context of 32 tokens is shorter than the windows of 64"),
        (merged, "it cuts own.txt into other tokens"),
    ):
        message = failure("eval", text, "--model", tiny_model, "--against", other, "--window", "64")
        assert f"{other.name} cannot be compared with tiny-v32: {words}" in message
    # Without a tokenizer there is nothing to compare.
    file.unlink()
    _, others = compared(text, "--model", tiny_model, "--against", merged)
    assert list(others) == ["merged"]


def test_several_processes_do_not_compare(
    text: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch = Launch(rank=0, world_size=4, local_rank=0, master_addr="localhost", master_port=1)
    monkeypatch.setattr(eval_schemes, "own_launch", lambda: launch)
    message = failure("eval", text, "--model", tiny_model, "--schemes", "all")
    assert "--schemes and --against are given to 4 processes" in message
