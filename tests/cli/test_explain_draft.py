"""``mortise explain --draft``: two models, each with hooks and decisions of its own."""

from __future__ import annotations

from collections import Counter

from mortise.spec.hooks import HOOKS
from tests.cli.command_line import mortise

ARGUMENTS = ("explain", "--draft", "2", "--draft-dispatch-dtype", "bf16")
OVERRIDE = "override asked for by command line --draft-dispatch-dtype"


def test_each_hook_has_a_row_for_each_model() -> None:
    outcome = mortise(*ARGUMENTS)
    assert outcome.code == 0, outcome.stderr
    lines = [" ".join(line.split()) for line in outcome.stdout.splitlines()]
    for role in ("main", "draft"):
        for hook, spec in HOOKS.items():
            start = f"{role} {hook} {spec.phase} reference (mortise-core 0.1.0) implemented"
            assert len([line for line in lines if line.startswith(start)]) == 1


def test_the_draft_has_decisions_of_its_own() -> None:
    lines = [" ".join(line.split()) for line in mortise(*ARGUMENTS).stdout.splitlines()]
    (drafting,) = [line for line in lines if line.startswith("draft model.layers.4.mlp bf16,")]
    assert OVERRIDE in drafting
    layers = [line for line in lines if line.startswith("main model.layers.")]
    assert len(layers) == 3
    assert not [line for line in layers if OVERRIDE in line]


def test_a_document_names_the_model_of_every_decision() -> None:
    decisions = mortise(*ARGUMENTS, "--json").document["decisions"]
    counts = Counter(one["role"] for one in decisions if one["subject"] in HOOKS)
    assert counts == {"main": len(HOOKS), "draft": len(HOOKS)}
    draft = {one["subject"] for one in decisions if one["role"] == "draft"}
    assert {"model", "backend", "model.layers.4.mlp", "weights", "cache"} <= draft
    without = mortise("explain", "--json").document["decisions"]
    assert "draft" not in {one["role"] for one in without}
