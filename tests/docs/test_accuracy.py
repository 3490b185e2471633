"""The page of accuracy shows the numbers of the result that is kept, in its tables and its plot."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from typing import Any

import pytest
from benchmarks import emulated, schemes

from mortise.cli.eval_schemes import SCHEMES
from tests.docs.pages import DOCS, REPOSITORY

PAGE = (DOCS / "reference/accuracy.md").read_text(encoding="utf-8")
RESULT = max((REPOSITORY / "benchmarks/results").glob("schemes-*.json"))
KEPT: dict[str, Any] = json.loads(RESULT.read_text(encoding="utf-8"))


@pytest.mark.parametrize("run", KEPT["runs"][:2], ids=lambda run: run["command"])
def test_the_page_shows_what_was_measured(run: dict[str, Any]) -> None:
    assert "\n".join(schemes.markdown(run)) in PAGE
    assert run["command"] in PAGE
    assert f"{run['documents']} texts" in PAGE
    assert f"{run['scores'][0]['predicted_tokens']:,} tokens" in PAGE


def test_the_page_says_when_where_and_with_what() -> None:
    machine = KEPT["machine"]
    assert RESULT.name in PAGE
    for fact in (
        KEPT["date"][:10],
        machine["processor"],
        f"{machine['cores']} cores",
        f"Python {machine['python']}",
        f"torch {machine['versions']['torch']}",
    ):
        assert fact in PAGE


def test_every_scheme_was_measured() -> None:
    for run in KEPT["runs"]:
        names = [score["name"] for score in run["scores"]]
        assert names == ["stdlib-10m", *SCHEMES]
        assert run["left_out"] == []


def test_the_plot_shows_the_same_numbers() -> None:
    root = ET.parse(schemes.PICTURE).getroot()
    texts = {text.text for text in root.iter("{http://www.w3.org/2000/svg}text")}
    for score in KEPT["runs"][0]["scores"][1:]:
        divergence = score["comparison"]["kl_nats_per_token"]["mean"]
        bits = f"{score['bits_per_weight']:.1f} bits/weight"
        shown = {score["name"], bits, f"{score['perplexity']:.2f}", f"{divergence:.2g}"}
        assert shown <= texts


@pytest.mark.parametrize("comparison", emulated.COMPARISONS.values(), ids=lambda one: one.name)
def test_the_page_shows_what_emulated_chips_make_of_the_schemes(
    comparison: emulated.Comparison,
) -> None:
    result = max((REPOSITORY / "benchmarks/results").glob(f"{comparison.name}-[0-9]*.json"))
    runs = json.loads(result.read_text(encoding="utf-8"))["runs"]
    assert [run["device"] for run in runs] == list(comparison.runs)
    assert [run["emulated"] for run in runs] == [False, *[True] * (len(runs) - 1)]
    assert "\n".join(emulated.markdown(comparison, runs)) in PAGE
    assert result.name in PAGE
    assert f"{runs[0]['predicted_tokens']:,} tokens" in PAGE
