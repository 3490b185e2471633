"""Several processes that share the experts give what one gives, and never wait for the dead."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch

from mortise import LLM, EngineConfig
from mortise.checkpoint import CheckpointTensors, ModelDirectory
from mortise.config import ResolvedConfig
from mortise.engine.joining import common_facts
from mortise.errors import ConfigError
from tests.cli.command_line import mortise
from tests.engine.rank_program import results
from tests.fixtures.launched import launch
from tests.fixtures.tiny_models import save_tiny

if TYPE_CHECKING:
    from pathlib import Path

PROGRAM = ("-m", "tests.engine.rank_program")
SCHEMES = {
    "fp8": ("--scheme", "fp8-block"),
    "fp8-ue8m0": ("--scheme", "fp8-block", "--ue8m0"),
    "int8": ("--scheme", "w8a8"),
    "nvfp4": ("--scheme", "nvfp4"),
}
"""Schemes whose rows travel quantised, by what they travel as."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny model, and what became of it in each scheme."""
    folder = tmp_path_factory.mktemp("shared")
    found = {"plain": save_tiny(folder / "plain")}
    for name, options in SCHEMES.items():
        outcome = mortise("quantize", folder / name, "--model", found["plain"], *options)
        assert outcome.code == 0, outcome.stderr
        found[name] = folder / name
    return found


NORMAL: dict[str, Any] = {"dispatch": {"mode": "normal"}}
LOW_LATENCY: dict[str, Any] = {
    "dispatch": {"mode": "low_latency", "max_tokens_per_rank": 64},
    "scheduler": {"max_num_batched_tokens": 48},
}
AUTO: dict[str, Any] = {"dispatch": {"mode": "auto"}}


def cases_of(models: dict[str, Path]) -> list[dict[str, Any]]:
    """Every payload in both exchanges, with more prompts than ranks and with fewer."""

    def case(name: str, dtype: str, exchange: dict[str, Any], num_prompts: int) -> dict[str, Any]:
        config = {"model": str(models[name]), "dtype": dtype, **exchange}
        return {"config": config, "num_prompts": num_prompts}

    payloads = [(name, "float32") for name in models] + [("plain", "bfloat16")]
    return [
        *(case(*payload, NORMAL, 4) for payload in payloads),
        *(case(*payload, LOW_LATENCY, 4) for payload in payloads),
        case("plain", "float32", AUTO, 1),
    ]


@pytest.mark.parametrize("world_size", [2, 4])
def test_every_payload_and_exchange_gives_the_tokens_of_one_process(
    models: dict[str, Path], tmp_path: Path, world_size: int
) -> None:
    cases = cases_of(models)
    file = tmp_path / "cases.json"
    file.write_text(json.dumps(cases), encoding="utf-8")
    ended = launch([[*PROGRAM, "cases", str(file)]] * world_size)
    assert [one.code for one in ended] == [0] * world_size, ended[0].stderr
    *found, refused = json.loads(ended[0].stdout)
    assert "the prompt has 600 tokens" in refused
    assert all(json.loads(one.stdout)[-1] == refused for one in ended)
    for case, shared in zip(cases, found, strict=True):
        alone = results(LLM(EngineConfig(**case["config"])), case["num_prompts"])
        assert shared["tokens"] == [list(tokens) for tokens in alone["tokens"]], case
        assert shared["order"] == alone["order"]
        # The sums of a product may round apart where other rows are multiplied beside them.
        tolerance = 2e-2 if case["config"]["dtype"] == "bfloat16" else 1e-4
        torch.testing.assert_close(
            torch.tensor(shared["last"]),
            torch.tensor(alone["last"]),
            rtol=tolerance,
            atol=tolerance,
        )
        modes = {"auto": {"normal", "low_latency"}}
        mode = case["config"]["dispatch"]["mode"]
        found = {text.split(", ")[-1] for text in shared["formats"]}
        assert found == modes.get(mode, {mode})


def test_the_command_line_shares_a_model_and_speaks_once(tiny_model: Path) -> None:
    command = ["-m", "mortise", "generate", "--model", str(tiny_model), "--max-tokens", "6"]
    (alone,) = launch([[*command, "one prompt", "--dtype", "float32"]])
    first, second = launch([[*command, "-", "--dtype", "float32"]] * 2, stdin="one prompt")
    assert (first.code, second.code) == (0, 0), first.stderr
    assert first.stdout == alone.stdout
    assert first.stdout.startswith("one prompt")
    assert (second.stdout, second.stderr) == ("", "")


def test_torchrun_starts_it(tiny_model: Path) -> None:
    command = ["-m", "mortise", "generate", "--model", str(tiny_model), "--json", "--dtype"]
    arguments = [*command, "float32", "--max-tokens", "6", "one", "--prompt", "two"]
    run = ["-m", "torch.distributed.run", "--nproc-per-node", "4"]
    (alone,) = launch([arguments])
    (shared,) = launch([[*run, *arguments]])
    assert shared.code == 0, shared.stderr
    tokens = [
        [completion["token_ids"] for completion in json.loads(outcome.stdout)["completions"]]
        for outcome in (alone, shared)
    ]
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize(
    ("manner", "news"),
    [
        ("killed", "no sign of life from rank 1"),
        ("raises", "rank 1 ended with ValueError: a fault in the last rank"),
        ("sleeps", "no sign of life from rank 1"),
    ],
)
def test_a_rank_that_is_lost_ends_the_others_in_the_stated_time(
    tiny_model: Path, manner: str, news: str
) -> None:
    command = [*PROGRAM, "loss", str(tiny_model), manner]
    # The page on expert parallelism promises parallel.timeout_seconds and ten seconds more.
    ended = launch([command] * 2, patience=100)
    before, after, *message = ended[0].stdout.splitlines()
    assert float(after) - float(before) < 6 + 10
    text = "\n".join(message)
    assert text.startswith("rank 0 of 2 lost contact during")
    assert news in text
    assert "expected: an answer of every rank within 6 s" in text


def test_ranks_that_were_told_different_things_end_with_what_differs(tiny_model: Path) -> None:
    command = ["-m", "mortise", "generate", "x", "--model", str(tiny_model), "--dtype"]
    first, second = launch([[*command, "float32"], [*command, "bfloat16"]])
    assert (first.code, second.code) == (2, 2)
    assert "error: process 0 of 2: 2 processes disagree on dtype" in first.stderr
    assert '"bfloat16" on rank 1' in first.stderr
    assert second.stderr == "error: process 1 of 2: 2 processes disagree on dtype\n"


def test_what_must_be_common_tells_models_and_configurations_apart(
    tiny_model: Path, tmp_path: Path
) -> None:
    other = save_tiny(tmp_path / "other", routed_scaling_factor=1.0)
    one, same, differing = (
        facts(EngineConfig(model=str(model), cache={"num_pages": pages}))
        for model, pages in ((tiny_model, 8), (tiny_model, 8), (other, 9))
    )
    assert one == same
    assert {key for key in one if one[key] != differing[key]} == {
        "config.json of the model",
        "cache.num_pages",
    }


def test_a_draft_of_its_own_must_be_common_too(tiny_model: Path, tmp_path: Path) -> None:
    same, other = (
        save_tiny(tmp_path / name, routed_scaling_factor=factor)
        for name, factor in (("same", 2.5), ("other", 1.0))
    )
    alone, *apart = (
        facts(EngineConfig(model=str(tiny_model), draft={"num_tokens": 1, "model": str(model)}))
        for model in (tiny_model, same, other)
    )
    assert not [key for key in alone if key.endswith("of the draft")]
    assert {key for key in apart[0] if apart[0][key] != apart[1][key]} == {
        "config.json of the draft"
    }


def facts(config: EngineConfig) -> dict[str, str]:
    """What a process would compare with the others."""
    directory = ModelDirectory.open(config.model)
    tensors = CheckpointTensors(directory.weight_files())
    draft = None if config.draft.model is None else ModelDirectory.open(config.draft.model)
    return common_facts(ResolvedConfig.of(config), directory, tensors, draft)


def test_low_latency_alone_must_hold_what_a_step_brings(tiny_model: Path) -> None:
    config = EngineConfig(model=str(tiny_model), dispatch={"mode": "low_latency"})
    with pytest.raises(ConfigError, match="capacity is 128 tokens a step"):
        LLM(config)


def test_low_latency_alone_must_hold_what_is_verified_in_a_step(tiny_model: Path) -> None:
    config = EngineConfig(
        model=str(tiny_model),
        dispatch={"mode": "low_latency", "max_tokens_per_rank": 64},
        scheduler={"max_num_batched_tokens": 64, "max_num_seqs": 17},
        draft={"num_tokens": 3},
    )
    with pytest.raises(ConfigError, match=r"draft\.num_tokens 3, 4 rows a request") as caught:
        LLM(config)
    assert "scheduler.max_num_seqs of at most 16" in str(caught.value)
