"""A model shared by two emulated chips says what it says on one, whatever rows travel in."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tests.cli.command_line import mortise
from tests.engine.rank_program import results
from tests.fixtures.launched import launch
from tests.fixtures.tiny_models import save_tiny

from mortise import LLM, EngineConfig

if TYPE_CHECKING:
    from pathlib import Path

PROGRAM = ("-m", "tests.engine.rank_program")
MODES: dict[str, dict[str, Any]] = {
    "normal": {"dispatch": {"mode": "normal"}},
    "low_latency": {
        "dispatch": {"mode": "low_latency", "max_tokens_per_rank": 64},
        "scheduler": {"max_num_batched_tokens": 48},
    },
}
ROWS = {"nvfp4": "nvfp4", "fp8-block": "fp8"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Narrow, with float4 and float8 weights and rows."""
    folder = tmp_path_factory.mktemp("shared")
    plain = save_tiny(
        folder / "plain", hidden_size=128, num_hidden_layers=2, moe_intermediate_size=64
    )
    for scheme in ROWS:
        outcome = mortise("quantize", folder / scheme, "--model", plain, "--scheme", scheme)
        assert outcome.code == 0, outcome.stderr
    return {scheme: folder / scheme for scheme in ROWS}


def case(model: Path, mode: str) -> dict[str, Any]:
    return {
        "num_prompts": 2,
        "config": {
            "model": str(model),
            "backend": "cuda_blackwell",
            "device": "emulated",
            "dtype": "bfloat16",
            # DeepEP carries hidden sizes from 2048 in low latency, and no NVFP4 rows at all.
            "backend_options": {"cuda_blackwell": {"exchange": "portable"}},
            "cache": {"max_num_tokens": 2048},
            **MODES[mode],
        },
    }


SHAPES = (("nvfp4", "normal"), ("nvfp4", "low_latency"), ("fp8-block", "low_latency"))


@pytest.mark.slow
def test_two_chips_give_the_logits_of_one(models: dict[str, Path], tmp_path: Path) -> None:
    cases = [case(models[scheme], mode) for scheme, mode in SHAPES]
    file = tmp_path / "cases.json"
    file.write_text(json.dumps(cases), encoding="utf-8")
    ended = launch([[*PROGRAM, "cases", str(file)]] * 2)
    assert [one.code for one in ended] == [0, 0], ended[0].stderr
    *found, _ = json.loads(ended[0].stdout)
    for (scheme, mode), one, shared in zip(SHAPES, cases, found, strict=True):
        alone = results(LLM(EngineConfig(**one["config"])), one["num_prompts"])
        (said,) = shared["formats"]
        assert said.startswith(f"{ROWS[scheme]}, ")
        assert said.endswith(mode)
        torch.testing.assert_close(
            torch.tensor(shared["last"]), torch.tensor(alone["last"]), rtol=2e-2, atol=2e-2
        )
