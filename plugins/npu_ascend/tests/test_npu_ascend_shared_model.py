"""A model shared by two emulated chips through DeepEP says what it says on one."""

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
from mortise.backends import load_backend
from mortise.plugin import ModelRole, QKVLayout, QKVShape
from mortise.reference.qkv import qkv_split

if TYPE_CHECKING:
    from pathlib import Path

PROGRAM = ("-m", "tests.engine.rank_program")
LOW_LATENCY = {
    "dispatch": {"mode": "low_latency", "max_tokens_per_rank": 64},
    "scheduler": {"max_num_batched_tokens": 48},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Wide enough for DeepEP on A3, as it is and with int8 weights and rows."""
    folder = tmp_path_factory.mktemp("shared")
    plain = save_tiny(
        folder / "plain", hidden_size=1024, num_hidden_layers=2, moe_intermediate_size=64
    )
    outcome = mortise("quantize", folder / "w8a8", "--model", plain, "--scheme", "w8a8")
    assert outcome.code == 0, outcome.stderr
    return {"bf16": plain, "int8": folder / "w8a8"}


def case(models: dict[str, Path], name: str, exchange: dict[str, Any]) -> dict[str, Any]:
    return {
        "num_prompts": 4,
        "config": {
            "model": str(models[name]),
            "backend": "npu_ascend",
            "device": "emulated",
            "dtype": "bfloat16",
            "backend_options": {"npu_ascend": {"generation": "A3", "exchange": "deep_ep"}},
            "cache": {"max_num_tokens": 2048},
            **exchange,
        },
    }


def test_two_chips_give_the_logits_of_one(models: dict[str, Path], tmp_path: Path) -> None:
    cases = [
        case(models, name, exchange)
        for name in models
        for exchange in ({"dispatch": {"mode": "normal"}}, LOW_LATENCY)
    ]
    file = tmp_path / "cases.json"
    file.write_text(json.dumps(cases), encoding="utf-8")
    ended = launch([[*PROGRAM, "cases", str(file)]] * 2)
    assert [one.code for one in ended] == [0, 0], ended[0].stderr
    *found, _ = json.loads(ended[0].stdout)
    for one, shared in zip(cases, found, strict=True):
        alone = results(LLM(EngineConfig(**one["config"])), one["num_prompts"])
        name = "int8" if one["config"]["model"].endswith("w8a8") else "bf16"
        mode = one["config"]["dispatch"]["mode"]
        assert shared["formats"] == [f"{name}, grouped, {mode}"]
        torch.testing.assert_close(
            torch.tensor(shared["last"]), torch.tensor(alone["last"]), rtol=2e-2, atol=2e-2
        )
        if name == "bf16":
            assert shared["tokens"] == [list(tokens) for tokens in alone["tokens"]]


@pytest.mark.parametrize("generation", ["A2", "A3", "A5"])
def test_nothing_is_left_to_the_reference(generation: str) -> None:
    bound = load_backend(
        "npu_ascend",
        role=ModelRole.MAIN,
        device="emulated",
        options={"generation": generation},
        strict=True,
    )
    assert bound.fallbacks == ()
    shape = QKVShape(
        num_key_heads=2,
        num_value_heads=4,
        key_head_dim=3,
        value_head_dim=5,
        layout=QKVLayout.INTERLEAVED,
    )
    inputs = (torch.randn(9, 52), torch.randn(9, 8))
    found, wanted = bound.ops.qkv_split(*inputs, shape), qkv_split(*inputs, shape)
    for part in ("mixed_qkv", "z", "b", "a"):
        assert torch.equal(getattr(found, part), getattr(wanted, part))
