"""``mortise doctor``: finds what is wrong with an installation, and says how to mend it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from mortise.testing.distributions import FakeDistribution
from tests.cli.command_line import mortise

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeDistribution]:
    with FakeDistribution(tmp_path / "site").installed() as installed:
        yield installed


def examined(**variables: str) -> tuple[int, dict[str, list[dict]]]:
    """The exit code, and what was found by the name of the check."""
    outcome = mortise("doctor", "--json", **variables)
    checks: dict[str, list[dict]] = {}
    for check in outcome.document["checks"]:
        checks.setdefault(check["name"], []).append(check)
    assert outcome.document["ok"] is (outcome.code == 0)
    return outcome.code, checks


def test_a_sound_installation_passes(builtin: Path) -> None:
    code, checks = examined()
    assert code == 0
    assert checks["backend reference"][0]["verdict"] == "ok"
    assert checks["built-in model"][0]["found"].startswith("deepseek_v32, ")
    assert {"python", "torch", "configuration", "distributions", "terminal"} <= set(checks)
    text = mortise("doctor")
    assert text.code == 0
    assert "ok   python " in text.stdout


def test_a_missing_model_fails_with_its_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.resources.files", lambda package: tmp_path)
    code, checks = examined()
    assert code == 1
    assert checks["built-in model"][0]["verdict"] == "fail"
    assert "install mortise-core again" in checks["built-in model"][0]["remedy"]
    text = mortise("doctor")
    assert text.code == 1
    assert "fail built-in model" in text.stdout


def test_a_damaged_model_fails(builtin: Path, tiny_model: Path, tmp_path: Path,
                               monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in tiny_model.iterdir():
        (damaged / file.name).write_bytes(file.read_bytes()[: 100 if "safe" in file.name else None])
    monkeypatch.setattr("mortise.checkpoint.directory.builtin_model_path", lambda: damaged)
    code, checks = examined()
    assert code == 1
    assert "model.safetensors" in checks["built-in model"][0]["found"]


def test_a_backend_that_cannot_be_used_fails_and_one_that_serves_later_does_not(
    builtin: Path, fake: FakeDistribution
) -> None:
    fake.add_backend(
        "later", manifest={"status": "planned", "status_reason": "in spring", "object": None}
    )
    code, checks = examined()
    assert code == 0
    assert checks["backend later"][0]["verdict"] == "note"
    fake.add_backend("broken", manifest="not TOML")
    code, checks = examined()
    assert code == 1
    assert checks["backend broken"][0]["verdict"] == "fail"
    assert checks["backend broken"][0]["found"].startswith("manifest_invalid: ")
    assert checks["backend broken"][0]["remedy"]


def test_files_that_two_distributions_claim_are_found(
    builtin: Path, fake: FakeDistribution
) -> None:
    fake.add_backend("one", package="shared")
    fake.add_backend("two", package="shared")
    for name in ("one", "two"):
        record = fake.folder / f"mortise_{name}-1.0.dist-info" / "RECORD"
        record.write_text("shared/backend.py,,\nshared/backend.toml,,\n")
    code, checks = examined()
    assert code == 1
    found = [check["found"] for check in checks["distributions"]]
    file = fake.folder / "shared" / "backend.py"
    assert f"{file} belongs to mortise-one and mortise-two" in found


def test_a_distribution_that_is_installed_twice_is_a_warning(
    builtin: Path, fake: FakeDistribution, tmp_path: Path
) -> None:
    fake.add_backend("twice")
    with FakeDistribution(tmp_path / "other").installed() as other:
        other.add_backend("twice", version="2.0")
        _, checks = examined()
    (warning,) = [check for check in checks["distributions"] if check["verdict"] == "warn"]
    assert warning["found"].startswith("mortise-twice is installed 2 times: 1.0 in ")
    assert "uninstall mortise-twice" in warning["remedy"]


def test_a_wrong_configuration_is_a_finding(builtin: Path, tmp_path: Path) -> None:
    config = tmp_path / "engine.toml"
    config.write_text("bakcend = 'reference'")
    code, checks = examined(MORTISE_CONFIG=str(config))
    assert code == 1
    assert "unknown configuration key 'bakcend'" in checks["configuration"][0]["found"]
    _, checks = examined(SGLANG_DEEPEP_BF16_DISPATCH="1")
    assert checks["environment"][0]["verdict"] == "warn"


def test_no_code_of_a_backend_runs(builtin: Path, fake: FakeDistribution) -> None:
    fake.add_backend("loud", init="raise RuntimeError('imported')")
    code, checks = examined()
    assert code == 0
    assert checks["backend loud"][0]["verdict"] == "ok"
