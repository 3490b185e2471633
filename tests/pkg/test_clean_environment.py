"""All distributions installed together, without the checkout: listed, checked, selected, judged."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import pytest

from mortise.backends.verdict import KIT_VERSION
from mortise.spec.hooks import HOOKS
from tests.pkg.installation import TOY, pip, run

if TYPE_CHECKING:
    from pathlib import Path

    from tests.pkg.installation import CleanEnvironment

BACKENDS = {"cuda_blackwell", "cuda_hopper", "fresh_chip", "npu_ascend", "reference", "toy"}
IMPLEMENTED = {
    "toy": {"prepare_expert_weights", "quantized_moe_apply"},
    "fresh_chip": {"qkv_split"},
}
THIRD_PARTY = tuple(sorted(IMPLEMENTED))
LISTING = """
import json, sys
from mortise.backends import discover_backends
before = set(sys.modules)
rows = {row.name: [row.location, row.usable] for row in discover_backends()}
loaded = sorted(name for name in set(sys.modules) - before if not name.startswith("mortise."))
print(json.dumps([rows, loaded, "torch" in sys.modules]))
"""
GENERATE = ("generate", "--temperature", "0", "--max-tokens", "6", "--json", "def f(x):")


def test_nothing_comes_from_the_checkout(environment: CleanEnvironment) -> None:
    program = "import mortise, mortise_toy, mortise_fresh_chip, mortise_npu_ascend as npu\n"
    program += "print(*(m.__file__ for m in (mortise, mortise_toy, mortise_fresh_chip, npu)))"
    places = run(environment.python, "-c", program).stdout.split()
    assert all(place.startswith(str(environment.packages)) for place in places), places


def test_the_installer_finds_nothing_missing(environment: CleanEnvironment) -> None:
    pip("check", python=environment.python)


def test_backends_are_listed_and_none_is_imported(environment: CleanEnvironment) -> None:
    rows, loaded, torch_loaded = json.loads(run(environment.python, "-c", LISTING).stdout)
    assert rows.keys() == BACKENDS
    assert all(row == [str(environment.packages), True] for row in rows.values()), rows
    assert not [name for name in loaded if name.startswith("mortise")]
    assert not torch_loaded


def test_doctor_is_green(environment: CleanEnvironment) -> None:
    document = json.loads(environment.mortise("doctor", "--json").stdout)
    assert document["ok"] is True
    wrong = [check for check in document["checks"] if check["verdict"] not in {"ok", "note"}]
    assert not wrong
    assert {f"backend {name}" for name in BACKENDS} <= {
        check["name"] for check in document["checks"]
    }


@pytest.mark.parametrize("name", THIRD_PARTY)
def test_doctor_is_green_about_a_backend_of_others(
    environment: CleanEnvironment, name: str
) -> None:
    assert json.loads(environment.mortise("doctor", "--backend", name, "--json").stdout)["ok"]


@pytest.mark.parametrize("name", THIRD_PARTY)
def test_a_backend_is_selected_by_name_and_tells_who_stands_in(
    environment: CleanEnvironment, name: str
) -> None:
    outcome = environment.mortise(*GENERATE, "--backend", name)
    found = json.loads(outcome.stdout)
    assert found["backend"] == name
    assert set(found["fallbacks"]) == set(HOOKS) - IMPLEMENTED[name]
    assert f"warning: backend {name!r} does not implement" in outcome.stderr
    expected = json.loads(environment.mortise(*GENERATE).stdout)
    assert found["completions"][0]["text"] == expected["completions"][0]["text"]


@pytest.mark.parametrize("name", THIRD_PARTY)
def test_a_backend_of_others_passes_the_kit(environment: CleanEnvironment, name: str) -> None:
    document = json.loads(environment.mortise("conformance", name, "--json").stdout)
    assert document["failed"] == []
    assert {"static", "host", "device"} == document["levels"].keys()
    assert all(counts["passed"] for counts in document["levels"].values())


def test_a_verdict_that_is_shipped_is_shown(environment: CleanEnvironment) -> None:
    document = json.loads(environment.mortise("backends", "--json").stdout)
    shown = {row["name"]: row["conformance"] for row in document["backends"]}
    assert shown["fresh_chip"] is None
    remedy = "run: mortise conformance toy --output .../mortise_toy/conformance.json"
    assert shown["toy"].startswith(f"conformant: kit {KIT_VERSION}, "), remedy
    lines = environment.mortise("backends").stdout.splitlines()
    assert f"toy: {shown['toy']}" in lines, f"it was given for something else; {remedy}"


@pytest.mark.parametrize("name", THIRD_PARTY)
def test_its_own_tests_pass(
    environment: CleanEnvironment, fresh: Path, tmp_path: Path, name: str
) -> None:
    project = {"toy": TOY, "fresh_chip": fresh}[name]
    for part in ("tests", "pyproject.toml"):
        copy = shutil.copytree if (project / part).is_dir() else shutil.copyfile
        copy(project / part, tmp_path / part)
    output = run(environment.python, "-m", "pytest", "-q", cwd=tmp_path).stdout
    assert " passed" in output
    assert "failed" not in output
