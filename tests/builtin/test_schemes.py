"""What the page of accuracy says of the shipped model can be measured again."""

from __future__ import annotations

from typing import Any

import pytest
from benchmarks.schemes import EXCERPT, RUNS

from tests.cli.command_line import mortise
from tests.docs.test_accuracy import KEPT


def by_name(run: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {score["name"]: score for score in run["scores"]}


def assert_agree(kept: dict[str, Any], measured: dict[str, Any]) -> None:
    """Equal as far as another order of sums, on another machine, leaves them equal."""
    for name, found in by_name(measured).items():
        expected = by_name(kept)[name]
        assert found["predicted_tokens"] == expected["predicted_tokens"]
        assert found["weight_bytes"] == expected["weight_bytes"]
        assert found["perplexity"] == pytest.approx(expected["perplexity"], rel=0.005)
        if expected["comparison"] is None:
            continue
        for field, tolerance in (
            ("kl_nats_per_token", {"rel": 0.25}),
            ("top1_agreement", {"abs": 0.01}),
        ):
            mean = expected["comparison"][field]["mean"]
            assert found["comparison"][field]["mean"] == pytest.approx(mean, **tolerance)


def test_a_part_of_the_page_is_measured_again() -> None:
    measured = mortise("eval", "--schemes", "bf16,w8a8,w4a4", *EXCERPT, "--json").document
    assert_agree(KEPT["runs"][RUNS.index(EXCERPT)], measured)
    found = by_name(measured)
    divergences = [
        found[name]["comparison"]["kl_nats_per_token"]["mean"] for name in ("bf16", "w8a8", "w4a4")
    ]
    # The published weights are bfloat16, and so is the default of their computation.
    assert divergences[0] == 0.0
    assert 0.0 < divergences[1] < divergences[2] / 10
    perplexities = [found[name]["perplexity"] for name in ("stdlib-10m", "bf16", "w4a4")]
    assert perplexities[0] == perplexities[1] < perplexities[2]


@pytest.mark.slow
def test_a_part_of_the_page_is_measured_again_for_every_scheme() -> None:
    measured = mortise("eval", "--schemes", "all", *EXCERPT, "--json").document
    assert measured["left_out"] == []
    assert_agree(KEPT["runs"][RUNS.index(EXCERPT)], measured)
