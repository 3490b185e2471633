"""The guard that fails the suite when a test, or the program, writes an environment variable."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

from mortise.cli import command_tree
from tests.environment_guard import ALLOWED, EnvironmentGuard
from tests.meta.tree import REPOSITORY

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

PROGRAM = """
import json, sys
from tests.environment_guard import EnvironmentGuard
guard = EnvironmentGuard()
sys.addaudithook(guard.hear)
from mortise.__main__ import main as program
for arguments in json.load(sys.stdin):
    sys.argv = ["mortise", *arguments]
    try:
        program()
    except SystemExit as end:
        assert not end.code, (arguments, end.code)
print("changes:", guard.changes())
"""


def run(
    arguments: list[str], folder: Path, stdin: str = "", **variables: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        input=stdin,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **variables},
        capture_output=True,
        text=True,
        check=False,
    )


def pytest_on(source: str, folder: Path) -> tuple[int, str, dict[str, set[str]]]:
    """Run tests below the conftest.py of this repository: exit code, output, what befell each."""
    shutil.copy(REPOSITORY / "conftest.py", folder)
    (folder / "test_it.py").write_text(source, encoding="utf-8")
    arguments = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--junitxml=report.xml"]
    outcome = run(arguments, folder, MARK_SET="1")
    cases = ET.parse(folder / "report.xml").iter("testcase")
    befell = {case.attrib["name"]: {child.tag for child in case} for case in cases}
    return outcome.returncode, outcome.stdout, befell


WRITES = (
    "os.environ['MARK'] = '1'",
    "os.environ.pop('MARK_SET')",
    "os.environ.update(MARK='2')",
    "os.putenv('MARK', '1')",
    "os.unsetenv('MARK')",
    "os.environ['OTHER'] = '1'; del os.environ['OTHER']",
    "os.environ._data[b'UNHEARD'] = b'1'",
    # Taken back at the end, but until then it holds for every model of the process.
    "monkeypatch.setenv('MARK', '3')",
    "monkeypatch.delenv('MARK')",
    # What a library may write is not for others to write.
    "os.environ['TORCHINDUCTOR_CACHE_DIR'] = '1'",
    "os.environ['PYTEST_CURRENT_TEST'] = 'MARK'",
)


def test_a_test_that_writes_fails_and_no_other(tmp_path: Path) -> None:
    source = ["import os, subprocess, sys, pytest"]
    for number, write in enumerate(WRITES):
        source += [f"def test_{number}_writes(monkeypatch):\n    {write}"]
        source += [f"def test_{number}_after():\n    pass"]
    code, output, befell = pytest_on("\n".join(source), tmp_path)
    assert code == 1
    assert len(befell) == 2 * len(WRITES)
    harmed = {name for name, what in befell.items() if what & {"failure", "error"}}
    assert harmed == {f"test_{number}_writes" for number in range(len(WRITES))}
    assert output.count("the environment of the process was written: ") >= len(WRITES)
    assert f"written: MARK, in {tmp_path / 'test_it.py'}:3" in output
    assert "written: UNHEARD, past os.environ" in output


WITH_A_FIXTURE = """
import os, subprocess, sys, pytest

@pytest.fixture(scope="session")
def written():
    os.environ["MARK"] = "1"

def test_reads_and_tells_its_child():
    code = "import os; assert os.environ.pop('MARK') == '1'"
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "MARK": "1"}, check=True)
    assert "test_reads" in os.environ["PYTEST_CURRENT_TEST"]

def test_uses(written):
    pass

def test_uses_again(written):
    pass
"""


def test_a_write_in_a_fixture_fails_the_test_that_sets_it_up(tmp_path: Path) -> None:
    code, output, befell = pytest_on(WITH_A_FIXTURE, tmp_path)
    assert code == 1
    assert befell == {
        "test_reads_and_tells_its_child": set(),
        "test_uses": {"error"},
        "test_uses_again": set(),
    }
    assert f"written: MARK, in {tmp_path / 'test_it.py'}:6" in output


def test_a_write_while_a_module_is_imported_fails_the_run(tmp_path: Path) -> None:
    source = "import os\nos.environ['MARK'] = '1'\ndef test_it(): pass"
    code, output, _ = pytest_on(source, tmp_path)
    assert code == 2
    assert f"written: MARK, in {tmp_path / 'test_it.py'}:2" in output


def test_it_watches_the_tests_of_plugins() -> None:
    arguments = ["-m", "pytest", "--collect-only", "--trace-config", "-p", "no:cacheprovider"]
    outcome = run([*arguments, "plugins/npu_ascend/tests"], REPOSITORY)
    assert "environment-guard" in outcome.stdout


def test_this_run_is_watched(request: pytest.FixtureRequest) -> None:
    assert request.config.pluginmanager.has_plugin("environment-guard")


def test_a_difference_that_was_not_heard_is_found_once() -> None:
    guard = EnvironmentGuard(before={**os.environ, "MARK": "1"})
    assert guard.changes() == ["MARK, past os.environ"]
    assert guard.changes() == []


def test_what_libraries_write_is_written_by_them_alone() -> None:
    guard = EnvironmentGuard()
    for name in ALLOWED:
        guard.hear("os.putenv", (name.encode(), b"1"))
    guard.hear("os.system", (b"MARK",))
    assert [change.partition(",")[0] for change in guard.changes()] == list(ALLOWED)


def test_no_verb_of_the_program_writes(tiny_model: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.txt"
    own.write_text("def f(x):\n    return x\n", encoding="utf-8")
    model = ["--model", str(tiny_model)]
    verbs = {
        "generate": ["def f(x):", "--max-tokens", "2", *model],
        "explain": ["--json", *model],
        "eval": [str(own), *model],
        "quantize": [str(tmp_path / "quantised"), "--scheme", "fp8-block", *model],
        "warmup": model,
        "backends": [],
        "conformance": ["reference", "--level", "host"],
        "new-plugin": ["my_chip", "--output", str(tmp_path / "my-chip")],
        "doctor": [],
        "record": [str(tmp_path / "recording"), "def f(x):", "--max-tokens", "2", *model],
        "replay": [str(tmp_path / "recording")],
        "diff": ["--backend", "reference", "--backend", "reference", "--max-tokens", "2", *model],
    }
    present = command_tree().commands
    assert set(present) <= set(verbs)
    lines = [[verb, *arguments] for verb, arguments in verbs.items() if verb in present]
    # The deprecated variable is what others wrote: here it is read, and stays as it is.
    outcome = run(
        ["-c", PROGRAM], tmp_path, stdin=json.dumps(lines), SGLANG_DEEPEP_BF16_DISPATCH="0"
    )
    assert outcome.returncode == 0, outcome.stderr
    assert outcome.stdout.splitlines()[-1] == "changes: []"
