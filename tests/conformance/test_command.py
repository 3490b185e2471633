"""The verb, the verdict that it writes, and the verdict that a distribution ships."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from mortise.backends.verdict import ConformanceVerdict, read_verdict
from mortise.conformance.options import option_table
from mortise.errors import ConfigError
from mortise.testing.distributions import FakeDistribution
from tests.cli.command_line import failure, mortise
from tests.conformance.broken_backends import CODE, MANIFEST, MISTAKES

if TYPE_CHECKING:
    from pathlib import Path

FEW = "splits-have-memory-of-their-own or the-manifest-is-accepted or experts-repeat"


def add(folder: Path, name: str, code: str, **changes: object) -> FakeDistribution:
    distributions = FakeDistribution(folder)
    distributions.add_backend(name, manifest={**MANIFEST, **changes}, code=code)
    return distributions


def verdict(**changes: object) -> ConformanceVerdict:
    fields = {
        "kit": 1,
        "core": "0.1.0",
        "backend": "right",
        "distribution": "mortise-right",
        "version": "1.0",
        "emulated": True,
        "date": "2026-11-22",
        "hooks": MANIFEST["implements"],
        "levels": {"device": {"passed": 212}},
    }
    return ConformanceVerdict.model_validate(fields | changes)


def test_a_right_backend(tmp_path: Path) -> None:
    output = tmp_path / "conformance.json"
    with add(tmp_path / "site", "right", CODE).installed():
        outcome = mortise("conformance", "right", "-k", FEW, "--output", output)
    assert outcome.code == 0, outcome
    found = read_verdict(output)
    assert found.ok
    assert (found.backend, found.distribution, found.device) == ("right", "mortise-right", "cpu")
    assert found.levels["static"].passed == 1
    assert found.hooks == MANIFEST["implements"]
    assert found.selected == FEW
    assert f"conformant: kit {found.kit}, {found.passed} passed, {found.date}" in outcome.stdout


def test_a_verdict_without_the_device_says_so() -> None:
    outcome = mortise("conformance", "reference", "--level", "static", "-k", "manifest")
    assert "conformant as far as it was asked (static): kit 1, 1 passed" in outcome.stdout


def test_a_broken_backend(tmp_path: Path) -> None:
    (aliasing,) = (one for one in MISTAKES if one.name == "aliasing")
    with add(tmp_path, "broken", aliasing.code).installed():
        outcome = mortise("conformance", "broken", "--level", "device", "-k", FEW)
    assert outcome.code == 1
    assert "FAILED splits-have-memory-of-their-own-contiguous" in outcome.stdout
    assert "shares the memory of its argument projected_ba" in outcome.stdout
    assert "NOT conformant" in outcome.stdout


def test_a_backend_that_ends_the_process(tmp_path: Path) -> None:
    code = CODE + (
        "\n    @hookimpl\n    def qkv_split(self, projected_qkvz, projected_ba, shape):\n"
        "        import os, signal\n        os.kill(os.getpid(), signal.SIGSEGV)\n"
    )
    with add(tmp_path, "broken", code).installed():
        message = failure("conformance", "broken", "--level", "device", "-k", "splits-equal")
    assert "the process that asked it ended with signal SIGSEGV" in message
    assert "mortise-broken" in message


def test_levels_and_options_reach_the_backend(tmp_path: Path) -> None:
    arguments = ("--level", "host", "--option", "num_workers=3", "-k", "capabilities")
    outcome = mortise("conformance", "reference", *arguments, "--json")
    assert list(outcome.document["levels"]) == ["host"]
    assert outcome.document["options"] == {"num_workers": 3}
    bad = mortise(
        "conformance", "reference", "--option", "num_workers=0", "-k", "created", "--json"
    )
    assert "cannot be bound here: option num_workers" in bad.document["skipped"][0]["reason"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nope",), "no backend 'nope' is installed"),
        (("reference", "-k", "nothing_like_this"), "no check matches 'nothing_like_this'"),
        (("reference", "-k", "and and"), "'and and' is no expression of pytest's -k"),
        (("reference", "--option", "num_workers"), "the option 'num_workers' has no value"),
        (
            ("reference", "-k", "manifest", "--output", "/nowhere/at/all.json"),
            "the verdict cannot be written to /nowhere/at/all.json",
        ),
    ],
)
def test_mistakes_of_the_user(arguments: tuple[str, ...], words: str) -> None:
    assert words in failure("conformance", *arguments)


def test_without_pytest(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "pytest" else found(name)
    )
    message = failure("conformance", "reference")
    assert "remedy: install mortise-core[conformance]" in message


def test_option_values_are_read_as_toml() -> None:
    texts = ["a=1", "b=true", "c=[1, 2]", 'd="x"', "e=plain text", "f=a=b"]
    expected = {"a": 1, "b": True, "c": [1, 2], "d": "x", "e": "plain text", "f": "a=b"}
    assert option_table(texts) == expected


def test_a_shipped_verdict_is_shown(tmp_path: Path) -> None:
    distributions = add(tmp_path, "right", CODE, conformance="conformance.json")
    (tmp_path / "fake_right" / "conformance.json").write_text(verdict().to_json())
    line = "conformant: kit 1, 212 passed, emulated, 2026-11-22"
    with distributions.installed():
        assert f"right: {line}\n" in mortise("backends").stdout
        rows = mortise("backends", "--json").document["backends"]
    (shown,) = (row["conformance"] for row in rows if row["name"] == "right")
    assert shown == line


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"version": "0.9"}, "it was for mortise-right 0.9"),
        ({"kit": 0}, "it was for kit 0, this core has 1"),
        ({"hooks": {"qkv_split": 1}}, "it was for other hooks"),
        ({"selected": "experts"}, "it was for the checks 'experts' alone"),
        ({"failed": [{"check": "a", "reason": "b"}]}, "NOT conformant, 1 failed"),
    ],
)
def test_a_verdict_for_something_else_says_so(
    changes: dict[str, object], words: str, tmp_path: Path
) -> None:
    distributions = add(tmp_path, "right", CODE, conformance="conformance.json")
    (tmp_path / "fake_right" / "conformance.json").write_text(verdict(**changes).to_json())
    with distributions.installed():
        assert words in mortise("backends").stdout


@pytest.mark.parametrize("text", [None, "{", '{"schema": 1}', '{"schema": 2, "kit": 1}'])
def test_a_verdict_that_cannot_be_read_is_said(text: str | None, tmp_path: Path) -> None:
    distributions = add(tmp_path, "right", CODE, conformance="conformance.json")
    if text is not None:
        (tmp_path / "fake_right" / "conformance.json").write_text(text)
    with distributions.installed():
        outcome = mortise("backends")
    assert outcome.code == 0
    assert "right: " in outcome.stdout
    assert "conformance.json" in outcome.stdout


def test_a_verdict_outside_the_package_is_no_name(tmp_path: Path) -> None:
    with add(tmp_path, "right", CODE, conformance="../other.json").installed():
        assert "manifest_invalid" in mortise("backends").stdout


def test_reading_what_is_no_verdict(tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    path.write_text(json.dumps({"schema": 1, "kit": "new"}))
    with pytest.raises(ConfigError, match="is no verdict of the conformance kit: kit"):
        read_verdict(path)


def run_pytest(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_the_tests_of_an_author(tmp_path: Path) -> None:
    path = tmp_path / "test_conformance.py"
    path.write_text(
        "from mortise.conformance import ConformanceTests\n\n\n"
        "class TestConformance(ConformanceTests):\n"
        '    backend = "reference"\n'
        '    options = {"num_workers": 3}\n'
    )
    outcome = run_pytest(tmp_path, "-k", "capabilities or manifest or splits-take-many", str(path))
    assert outcome.returncode == 0, outcome.stdout
    assert "4 passed" in outcome.stdout


def test_the_plugin_of_pytest(tmp_path: Path) -> None:
    kit = ("-p", "mortise.conformance.plugin", "--pyargs", "mortise.conformance.suite")
    chosen = ("--mortise-level", "host", "-k", "capabilities")
    outcome = run_pytest(tmp_path, *kit, "--mortise-backend", "reference", *chosen)
    assert outcome.returncode == 0, outcome.stdout
    assert "1 passed" in outcome.stdout
