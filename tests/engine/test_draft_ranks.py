"""Processes that share a model's experts draft together, and generate what one does alone."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from mortise import LLM, EngineConfig
from tests.engine.rank_program import PROMPTS, results
from tests.fixtures.drafted_models import save_drafted
from tests.fixtures.launched import launch

if TYPE_CHECKING:
    from pathlib import Path

PLACES: tuple[tuple[int, dict[str, Any]], ...] = (
    (1, {}),
    (3, {}),
    (len(PROMPTS), {"dispatch": {"max_tokens_per_rank": 5}}),
    (3, {"dispatch": {"mode": "low_latency"}, "scheduler": {"max_num_batched_tokens": 64}}),
)
"""Prompts: with one the other rank is idle throughout, with three for a while at the end. Of five
tokens there is room for what drafts, and not always for what verifies."""


@pytest.mark.parametrize("model_type", ["glm_moe_dsa", "qwen3_next"])
def test_two_ranks_generate_what_one_process_does(model_type: str, tmp_path: Path) -> None:
    path = save_drafted(tmp_path / "model", model_type=model_type)
    plain: dict[str, Any] = {"model": str(path), "dtype": "float32"}
    drafting = plain | {"draft": {"num_tokens": 3}}
    cases = [{"config": drafting | more, "num_prompts": number} for number, more in PLACES]
    file = tmp_path / "cases.json"
    file.write_text(json.dumps(cases), encoding="utf-8")
    ended = launch([["-m", "tests.engine.rank_program", "cases", str(file)]] * 2)
    assert [one.code for one in ended] == [0, 0], ended[0].stderr
    *found, _ = json.loads(ended[0].stdout)
    without, alone = LLM(EngineConfig(**plain)), LLM(EngineConfig(**drafting))
    for case, shared in zip(cases, found, strict=True):
        number = case["num_prompts"]
        expected = [list(tokens) for tokens in results(alone, number)["tokens"]]
        assert shared["tokens"] == expected
        greedy = [list(tokens) for tokens in results(without, number)["tokens"][:number]]
        assert shared["tokens"][:number] == greedy
