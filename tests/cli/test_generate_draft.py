"""``mortise generate --draft``: the same text, and what drafting came to beside it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest

from mortise.checkpoint.directory import builtin_model_path
from mortise.cli.drafting import drafting_text
from mortise.engine.events import Completion, Timings
from mortise.engine.speculative.statistics import DraftStatistics
from tests.cli.command_line import mortise

if TYPE_CHECKING:
    from pathlib import Path

PROMPTS = ("def fibonacci(n):", "--prompt", "class Stack:")
GREEDY = ("generate", *PROMPTS, "--temperature", "0", "--max-tokens", "16")


def finished(drafting: DraftStatistics | None) -> Completion:
    """Of a request about which nothing else is asked."""
    return Completion(
        index=0,
        prompt=None,
        prompt_token_ids=(),
        healed_token_id=None,
        text=None,
        token_ids=(),
        finish_reason="length",
        stopped_by=None,
        seed=0,
        logprobs=None,
        timings=Timings(first_token=0.0, total=0.0, prompt_tokens=0, generated_tokens=0),
        drafting=drafting,
    )


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        (
            [(4, 12, (3, 2, 1)), (6, 18, (4, 1, 0))],
            "drafted 3 a step: 2.10 tokens a step, accepted 70% 30% 10%",
        ),
        ([(2, 6, (0, 0, 0))], "drafted 3 a step: 1.00 tokens a step, accepted 0% 0% 0%"),
        ([(0, 0, (0, 0, 0))], "drafted 3 a step: none was verified"),
    ],
)
def test_the_line_tells_of_all_completions_together(
    counts: list[tuple[int, int, tuple[int, ...]]], expected: str
) -> None:
    completions = [
        finished(DraftStatistics(steps=steps, drafted=drafted, accepted_by_place=places))
        for steps, drafted, places in counts
    ]
    assert drafting_text(3, completions) == expected


def without_times(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Completions without what may differ."""
    varying = {"timings", "drafting", "seed"}
    return [
        {key: value for key, value in one.items() if key not in varying}
        for one in document["completions"]
    ]


@pytest.fixture(scope="module")
def drafted() -> dict[str, Any]:
    """The document of a run that drafts."""
    return mortise(*GREEDY, "--draft", "2", "--json").document


def test_the_text_is_the_same(drafted: dict[str, Any]) -> None:
    plain = mortise(*GREEDY, "--json").document
    assert without_times(drafted) == without_times(plain)
    assert plain["draft"] is None
    assert [one["drafting"] for one in plain["completions"]] == [None, None]


def test_a_document_tells_who_drafted_and_how_well(drafted: dict[str, Any]) -> None:
    assert drafted["draft"] == {
        "num_tokens": 2,
        "model": str(builtin_model_path()),
        "backend": "reference",
        "emulated": False,
    }
    for one in drafted["completions"]:
        told = one["drafting"]
        first, second = told["accepted_by_place"]
        assert told["drafted"] == 2 * told["steps"] > 0
        assert 0 <= second <= first <= told["steps"]
        assert told["acceptance_rate"] == (first + second) / told["drafted"]
        assert told["acceptance_length"] == 1 + (first + second) / told["steps"]


def test_the_line_tells_what_the_document_does(drafted: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "engine.toml"
    file.write_text("[draft]\nnum_tokens = 2\n", encoding="utf-8")
    each = [one["drafting"] for one in drafted["completions"]]
    steps = sum(one["steps"] for one in each)
    first, second = (sum(one["accepted_by_place"][place] for one in each) for place in (0, 1))
    assert (
        f" | drafted 2 a step: {1 + (first + second) / steps:.2f} tokens a step,"
        f" accepted {first / steps:.0%} {second / steps:.0%} | reference on cpu"
    ) in mortise(*GREEDY, "--config", file).stderr


def test_where_nothing_drafts_nothing_is_said_of_it() -> None:
    assert "draft" not in mortise("generate", "import ", "--max-tokens", "2").stderr


def test_one_token_leaves_nothing_to_verify() -> None:
    arguments = ("generate", "import ", "--max-tokens", "1", "--draft", "3")
    assert " | drafted 3 a step: none was verified | " in mortise(*arguments).stderr
    (completion,) = mortise(*arguments, "--json").document["completions"]
    assert completion["drafting"] == {
        "steps": 0,
        "drafted": 0,
        "accepted_by_place": [0, 0, 0],
        "acceptance_rate": None,
        "acceptance_length": None,
    }


def test_a_seed_repeats_a_run_that_drafts() -> None:
    arguments = ("generate", "import ", "--temperature", "1", "--seed", "5", "--max-tokens", "12")
    first, second = (mortise(*arguments, "--draft", "2") for _ in range(2))
    assert first.stdout == second.stdout
    assert re.search(r"drafted 2 a step: [\d.]+ tokens a step", first.stderr)


def test_a_model_without_the_layer_cannot_draft(tiny_model: Path) -> None:
    outcome = mortise("generate", "a", "--model", tiny_model, "--draft", "1")
    assert (outcome.code, outcome.stdout) == (2, "")
    assert "multi-token prediction layer" in outcome.stderr
