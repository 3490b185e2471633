"""``mortise doctor``: finds what is wrong with an installation, and says how to mend it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from mortise.testing.distributions import QKV_SPLIT, FakeDistribution, backend_code
from tests.cli.command_line import mortise

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeDistribution]:
    with FakeDistribution(tmp_path / "site").installed() as installed:
        yield installed


ADVISING = """
@classmethod
def doctor(cls, request):
    from mortise.plugin import Finding, Verdict
    return [
        Finding("a library", Verdict.WARN, "it is old", "install a newer one"),
        Finding("the run", Verdict.OK, repr(request)),
    ]
"""


def examined(*arguments: str | Path, **variables: str) -> tuple[int, dict[str, list[dict]]]:
    """The exit code, and what was found by the name of the check."""
    outcome = mortise("doctor", "--json", *arguments, **variables)
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


def test_no_code_of_a_backend_runs_that_is_not_configured(
    builtin: Path, fake: FakeDistribution
) -> None:
    fake.add_backend("loud", init="raise RuntimeError('imported')")
    code, checks = examined()
    assert code == 0
    assert checks["backend loud"][0]["verdict"] == "ok"
    code, checks = examined("--backend", "loud")
    assert code == 1
    assert "imported" in checks["configured backend"][0]["found"]


def test_the_configured_backend_is_told_of_the_run_and_says_what_it_finds(
    builtin: Path, fake: FakeDistribution, tiny_model: Path, tmp_path: Path
) -> None:
    fake.add_backend("advising", code=backend_code(QKV_SPLIT + ADVISING))
    config = tmp_path / "engine.toml"
    config.write_text(
        f"""
        model = "{tiny_model}"
        device = "here"
        backend_options.advising.depth = 3
        scheduler = {{max_num_seqs = 7, max_num_batched_tokens = 5}}
        dispatch.max_tokens_per_rank = 11
        """
    )
    code, checks = examined("--config", config, "--backend", "advising")
    assert code == 0
    assert checks["configured model"][0]["found"] == f"deepseek_v32, {tiny_model}"
    (advice,) = checks["advising: a library"]
    assert (advice["verdict"], advice["found"]) == ("warn", "it is old")
    assert advice["remedy"] == "install a newer one"
    told = checks["advising: the run"][0]["found"]
    for fact in (
        "device='here'",
        "'depth': 3",
        "world_size=1",
        "max_tokens=7",
        "max_tokens_per_rank=11",
        "modes=(<DispatchMode.NORMAL: 'normal'>,)",
        "hidden_size=64",
        "num_experts=8",
        "num_experts_per_tok=3",
    ):
        assert fact in told, told


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ("raise ValueError('a bug')", "ValueError: a bug"),
        ("return ['all is well']", "doctor() returned what is no mortise.plugin.Finding"),
        (
            "from mortise.plugin import ConfigError; raise ConfigError('depth is 3')",
            "depth is 3",
        ),
    ],
)
def test_a_backend_that_cannot_look_is_a_finding(
    builtin: Path, fake: FakeDistribution, answer: str, found: str
) -> None:
    methods = f"{QKV_SPLIT}\n@classmethod\ndef doctor(cls, request):\n    {answer}\n"
    fake.add_backend("odd", code=backend_code(methods))
    code, checks = examined("--backend", "odd")
    assert code == 1
    assert checks["odd: doctor"][0]["verdict"] == "fail"
    assert checks["odd: doctor"][0]["found"].startswith(found)


def test_a_model_that_is_not_there_does_not_keep_the_backend_from_looking(
    builtin: Path, fake: FakeDistribution, tmp_path: Path
) -> None:
    fake.add_backend("advising", code=backend_code(QKV_SPLIT + ADVISING))
    code, checks = examined("--backend", "advising", "--model", tmp_path / "none")
    assert code == 1
    assert checks["configured model"][0]["verdict"] == "fail"
    assert "hidden_size=0" in checks["advising: the run"][0]["found"]


def test_a_backend_that_is_not_installed_fails(builtin: Path) -> None:
    code, checks = examined("--backend", "nowhere")
    assert code == 1
    assert "no backend 'nowhere' is installed" in checks["configured backend"][0]["found"]


def test_the_device_of_the_configured_backend_is_asked_unless_it_is_emulated(
    fake: FakeDistribution,
) -> None:
    fake.add_backend("elsewhere", manifest={"devices": ["/dev/no-such-node"]})
    code, checks = examined("--backend", "elsewhere")
    assert code == 1
    assert checks["elsewhere: device"][0]["verdict"] == "fail"
    assert checks["elsewhere: device"][0]["found"].startswith("device_absent: no device node")
    _, checks = examined("--backend", "elsewhere", "--device", "emulated")
    assert "elsewhere: device" not in checks


def test_the_directory_of_a_draft_is_looked_at(tiny_model: Path) -> None:
    code, checks = examined("--draft", "2")
    assert code == 0
    assert checks["configured draft"][0]["found"].startswith("2 tokens a step, from ")
    code, checks = examined("--draft", "2", "--draft-model", tiny_model)
    assert code == 1
    assert "cannot draft for the one in" in checks["configured draft"][0]["found"]
    assert "correct draft.model (--draft-model)" in checks["configured draft"][0]["remedy"]
    assert "configured draft" not in examined()[1]
