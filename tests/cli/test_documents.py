"""The page of the JSON documents lists the fields that are printed, all of them and no others."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import pytest

from mortise.backends.verdict import ConformanceVerdict, EndedCheck, LevelCounts, WorstError
from mortise.cli import eval_schemes
from mortise.conformance import session
from mortise.reference.backend import ReferenceBackend
from mortise.spec.warmup import WarmupJob
from tests.cli.command_line import mortise
from tests.docs.pages import DOCS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

NAMED_BY_USERS = {"hooks", "configuration", "options", "levels", "worst"}
"""Objects whose keys are names, not fields."""


def documented(section: str) -> set[str]:
    text = (DOCS / "reference/json.md").read_text(encoding="utf-8")
    match = re.search(rf"^## {section}\n(.*?)(?=^## |\Z)", text, flags=re.DOTALL | re.MULTILINE)
    assert match
    return set(re.findall(r"^\| `([^`]+)` \|", match[1], flags=re.MULTILINE))


def fields(value: Any, place: str = "") -> Iterator[str]:
    """The dotted name of every field that holds a value of its own."""
    match value:
        case dict():
            for key, inner in value.items():
                name = "NAME" if place in NAMED_BY_USERS or place.endswith(".hooks") else key
                yield from fields(inner, f"{place}.{name}".removeprefix("."))
        case list():
            for inner in value:
                yield from fields(inner, f"{place}[]")
        case _:
            yield place


def assert_documented(section: str, value: dict[str, Any]) -> None:
    printed, described = set(fields(value)), documented(section)
    # A whole object or list that is null or empty stands for the fields inside it.
    unknown = {
        name
        for name in printed - described
        if not any(one.startswith((f"{name}.", f"{name}[")) for one in described)
    }
    assert not unknown
    lists = {name for name in described if name.endswith("[]")}
    assert described - printed <= lists


def test_a_failure() -> None:
    outcome = mortise("generate", "x", "--backend", "refrence", "--model", ".", "--json")
    document = json.loads(outcome.stderr)
    assert set(document["error"]) == {
        name.removeprefix("error.").removesuffix("[]") for name in documented("Failure")
    } - {"schema"}


@pytest.mark.parametrize(
    ("section", "arguments"),
    [
        ("backends", ["backends"]),
        ("explain", ["explain"]),
        ("doctor", ["doctor"]),
    ],
)
def test_a_verb(builtin: Path, section: str, arguments: list[str]) -> None:
    assert_documented(section, mortise(*arguments, "--json").document)


def test_generate() -> None:
    # The built-in model itself: it has a layer that drafts.
    prompts = ("generate", "import os", "--prompt", "def f(")
    arguments = (*prompts, "--max-tokens", "4", "--logprobs", "1", "--draft", "2", "--json")
    assert_documented("generate", mortise(*arguments).document)


@pytest.mark.usefixtures("builtin")
def test_warmup(monkeypatch: pytest.MonkeyPatch) -> None:
    job = WarmupJob(name="a kernel", key=1, run=lambda: None)
    monkeypatch.setattr(ReferenceBackend, "warmup", lambda _self, _request: [job])
    assert_documented("warmup", mortise("warmup", "--json").document)


def test_new_plugin(tmp_path: Path) -> None:
    arguments = ("new-plugin", "my_chip", "--output", tmp_path / "new", "--json")
    assert_documented("new-plugin", mortise(*arguments).document)


def test_conformance(monkeypatch: pytest.MonkeyPatch) -> None:
    verdict = ConformanceVerdict(
        kit=1,
        core="0.1.0",
        backend="toy",
        distribution="mortise-toy",
        version="0.1.0",
        date="2026-11-22",
        hooks={"qkv_split": 1},
        options={"num_workers": 2},
        levels={"host": LevelCounts(passed=1)},
        worst={"qkv_split": WorstError(error=0.0, tolerance=0.1)},
        skipped=(EndedCheck(check="one", reason="not here"),),
        failed=(EndedCheck(check="other", reason="wrong"),),
    )
    monkeypatch.setattr(session, "run_conformance", lambda *_arguments: verdict)
    outcome = mortise("conformance", "toy", "--json")
    assert outcome.code == 1
    assert_documented("conformance", json.loads(outcome.stdout))


def test_eval(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "own.txt"
    file.write_text("def f(x):\n    return x\n")
    # Each field has a value of its own somewhere: one scheme fits the override, one does not.
    monkeypatch.setattr(eval_schemes, "SCHEMES", ("fp8-block", "w8a8"))
    arguments = ["eval", file, "--model", tiny_model, "--window", "8", "--json"]
    compared = mortise(*arguments, "--schemes", "all", "--dispatch-dtype", "fp8").document
    assert_documented("eval", compared)
    alone = mortise(*arguments).document
    assert set(fields(alone)) <= documented("eval") | {"scores[].comparison"}
