"""``mortise backends`` and ``mortise explain``: what there is, what was decided, and why."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest

from mortise.spec.hooks import HOOKS
from mortise.testing.distributions import FakeDistribution
from tests.cli.command_line import mortise

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeDistribution]:
    with FakeDistribution(tmp_path / "site").installed() as installed:
        yield installed


def test_backends_are_listed_without_running_their_code(fake: FakeDistribution) -> None:
    fake.add_backend("good", init="raise RuntimeError('imported')")
    fake.add_backend("future", manifest={"engine": ">=9"})
    before = set(sys.modules)
    outcome = mortise("backends")
    assert outcome.code == 0
    lines = {line.split()[0]: line for line in outcome.stdout.splitlines() if line}
    assert lines["good"].split()[1:4] == ["mortise-good", "1.0", "usable"]
    assert "qkv_split 1" in lines["good"]
    assert str(fake.folder / "fake_good" / "backend.toml") in lines["good"]
    assert "engine_incompatible" in lines["future"]
    assert "future: it needs mortise-core >=9, installed is 0.1.0" in outcome.stdout
    assert f"all {len(HOOKS)}" in lines["reference"]
    assert not [name for name in set(sys.modules) - before if name.startswith("fake_")]


def test_backends_as_a_document(fake: FakeDistribution) -> None:
    fake.add_backend("future", manifest={"engine": ">=9"})
    document = mortise("backends", "--json").document
    rows = {row["name"]: row for row in document["backends"]}
    assert document["schema"] == 1
    assert rows["reference"]["usable"] is True
    assert rows["reference"]["hooks"] == {name: spec.version for name, spec in HOOKS.items()}
    assert rows["future"]["usable"] is False
    assert rows["future"]["reason"] == "engine_incompatible"
    assert rows["future"]["remedy"]


def test_backends_say_on_request_whether_their_device_is_here(fake: FakeDistribution) -> None:
    fake.add_backend("good")
    fake.add_backend("elsewhere", manifest={"devices": ["/dev/no-such-node"]})
    rows = {
        row["name"]: row for row in mortise("backends", "--probe", "--json").document["backends"]
    }
    assert (rows["good"]["usable"], rows["good"]["explanation"]) == (True, "needs no device")
    assert rows["elsewhere"]["reason"] == "device_absent"
    assert "good: needs no device" in mortise("backends", "--probe").stdout


def test_explain_shows_values_with_origins_and_decisions_with_reasons(
    builtin: Path, tmp_path: Path
) -> None:
    config = tmp_path / "engine.toml"
    config.write_text("[cache]\nnum_pages = 9\n")
    outcome = mortise("explain", "--config", config, "--dtype", "bfloat16")
    assert outcome.code == 0
    lines = [" ".join(line.split()) for line in outcome.stdout.splitlines()]
    assert f"cache.num_pages 9 file {config}" in lines
    assert 'dtype "bfloat16" command line --dtype' in lines
    assert 'backend "reference" default' in lines
    for hook, spec in HOOKS.items():
        assert any(
            line.startswith(f"main {hook} {spec.phase} reference (mortise-core 0.1.0) implemented")
            for line in lines
        )
    assert "main dtype bfloat16 override configured command line --dtype" in lines
    assert any(line.startswith("main model.layers.1.mlp bf16, grouped, normal") for line in lines)
    assert any(line.startswith("main cache 9 pages, ") for line in lines)


def test_explain_tells_who_stands_in_and_warns(builtin: Path, fake: FakeDistribution) -> None:
    fake.add_backend("partial")
    outcome = mortise("explain", "--backend", "partial", "--json")
    document = outcome.document
    rules = {one["subject"]: one["rule"] for one in document["decisions"]}
    assert rules["qkv_split"] == "implemented"
    assert {rules[hook] for hook in HOOKS if hook != "qkv_split"} == {"fallback"}
    assert all(one["reason"] for one in document["decisions"])
    assert document["backend"]["name"] == "partial"
    assert document["configuration"]["backend"] == {
        "value": "partial",
        "origin": "command line --backend",
    }
    first = outcome.stderr.splitlines()[0]
    assert first.startswith("warning: backend 'partial' does not implement resolve_dispatch_dtype,")
    assert "the exact reference answers" in first


def test_explain_shows_the_options_of_backends(builtin: Path, tmp_path: Path) -> None:
    config = tmp_path / "engine.toml"
    config.write_text("[backend_options.reference]\nnum_workers = 7\n")
    document = mortise("explain", "--config", config, "--json").document
    row = document["configuration"]["backend_options.reference.num_workers"]
    assert row == {"value": 7, "origin": f"file {config}"}


def test_options_for_a_backend_that_is_not_installed_are_news(
    builtin: Path, tmp_path: Path
) -> None:
    config = tmp_path / "engine.toml"
    config.write_text("[backend_options.refrence]\nnum_workers = 7\n")
    outcome = mortise("explain", "--config", config)
    assert outcome.code == 0
    assert outcome.stderr == (
        "warning: backend_options.refrence is for a backend that is not installed\n"
    )
