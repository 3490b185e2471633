"""``mortise new-plugin``: names are checked, and a directory appears whole or not at all."""

from __future__ import annotations

import json
import sys
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mortise.backends.manifest import parse_manifest
from mortise.errors import NewPluginError
from mortise.scaffold import PluginPlan, plan_plugin, render_plugin
from mortise.scaffold import render as rendering
from mortise.spec.hooks import HOOKS
from mortise.testing.distributions import FakeDistribution
from tests.cli.command_line import failure, mortise


def texts(plan: PluginPlan) -> dict[str, str]:
    return {str(path): text for path, text in render_plugin(plan).items()}


def found(directory: Path) -> list[str]:
    return sorted(
        path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()
    )


def test_it_writes_what_it_says(tmp_path: Path) -> None:
    outcome = mortise("new-plugin", "my_chip", "--output", tmp_path / "deep" / "new", "--json")
    assert outcome.code == 0
    document = outcome.document
    assert document["distribution"] == "mortise-my-chip"
    assert document["package"] == "mortise_my_chip"
    assert document["directory"] == str(tmp_path / "deep" / "new")
    assert sorted(document["files"]) == found(tmp_path / "deep" / "new")
    assert "src/mortise_my_chip/backend.toml" in document["files"]


def test_it_tells_people_what_to_do_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = mortise("new-plugin", "my_chip")
    lines = [line.strip() for line in outcome.stdout.splitlines()]
    assert lines[0] == f"{tmp_path / 'mortise-my-chip'}:"
    assert f"cd {tmp_path / 'mortise-my-chip'}" in lines
    assert "pip install --editable . --group test" in lines
    assert "mortise conformance my_chip" in lines


def test_an_empty_directory_is_filled_and_stays_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    inode = tmp_path.stat().st_ino
    assert mortise("new-plugin", "my_chip", "--output", ".").code == 0
    assert found(Path()) == sorted(texts(PluginPlan(name="my_chip")))
    assert tmp_path.stat().st_ino == inode


@pytest.mark.parametrize("vendor", ["", 'Acme "Corp" \\ Söhne', "'''", "100 % {x} $y %{name}"])
def test_free_text_stays_what_it_is(vendor: str) -> None:
    files = texts(plan_plugin("my_chip", vendor=vendor))
    manifest = parse_manifest(files["src/mortise_my_chip/backend.toml"])
    project = tomllib.loads(files["pyproject.toml"])["project"]
    assert manifest.summary == project["description"]
    assert vendor in manifest.summary
    assert manifest.summary in files["README.md"]


def test_the_manifest_says_what_this_core_serves() -> None:
    manifest = parse_manifest(texts(PluginPlan(name="chip"))["src/mortise_chip/backend.toml"])
    assert manifest.implements == {"qkv_split": HOOKS["qkv_split"].version}
    assert manifest.object == "mortise_chip.backend:ChipBackend"


def test_no_word_is_left_to_fill_in() -> None:
    for path, text in texts(PluginPlan(name="chip")).items():
        assert "%{" not in f"{path}{text}"


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("My-Chip", "call it 'my_chip'"),
        ("3d", "call it 'd'"),
        ("chip_", "call it 'chip'"),
        ("my__chip", "call it 'my_chip'"),
        ("../chip", "call it 'chip'"),
        ("mön", "call it 'm_n'"),
        ("a" * 41, f"call it '{'a' * 40}'"),
        ("", "choose such a name"),
        ("42", "choose such a name"),
        ("Auto!", "choose such a name"),
    ],
)
def test_a_wrong_name_is_refused_with_a_better_one(name: str, remedy: str, tmp_path: Path) -> None:
    message = failure("new-plugin", name, "--output", tmp_path / "new")
    assert f"{name!r} cannot be the name of a backend" in message
    assert remedy in message
    assert not list(tmp_path.iterdir())


@given(st.text(max_size=50))
def test_whatever_is_suggested_may_be_taken(name: str) -> None:
    try:
        plan_plugin(name, allow_installed=True)
    except NewPluginError as error:
        if "call it" in (error.remedy or ""):
            plan_plugin(error.remedy.split("'")[1], allow_installed=True)


@pytest.mark.parametrize("name", ["auto", "reference", "none", "core"])
def test_a_name_of_the_core_is_refused(name: str) -> None:
    for more in ((), ("--allow-installed",)):
        assert f"the core keeps the name {name!r}" in failure("new-plugin", name, *more)


def test_a_taken_name_is_refused_unless_told(tmp_path: Path) -> None:
    with FakeDistribution(tmp_path / "site").installed() as fake:
        fake.add_backend("chip", init="raise RuntimeError('imported')", package="other_package")
        message = failure("new-plugin", "chip", "--output", tmp_path / "new")
        assert "the name 'chip' is taken" in message
        assert "backend chip: mortise-chip 1.0" in message
        assert "distribution mortise-chip 1.0" in message
        assert "--allow-installed" in message
        assert not (tmp_path / "new").exists()
        allowed = mortise("new-plugin", "chip", "--output", tmp_path / "new", "--allow-installed")
    assert allowed.code == 0
    assert "other_package" not in sys.modules


def test_a_taken_package_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mortise_chip.py").write_text("raise RuntimeError('imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "package mortise_chip" in failure("new-plugin", "chip", "--output", tmp_path / "new")


@pytest.mark.parametrize("vendor", ["two\nlines", "\x1b[31m", "x" * 81, "\udc80"])
def test_a_vendor_is_one_line(vendor: str, tmp_path: Path) -> None:
    arguments = ("new-plugin", "chip", "--vendor", vendor, "--output", tmp_path / "new")
    assert "the vendor is" in failure(*arguments)
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "keep.txt").write_text("mine")
    message = failure("new-plugin", "chip", "--output", tmp_path)
    assert f"{str(tmp_path)!r} is not empty" in message
    assert "found: keep.txt" in message
    assert "--output" in message
    assert found(tmp_path) == ["keep.txt"]


def test_what_is_no_directory_is_left_alone(tmp_path: Path) -> None:
    file, dangling = tmp_path / "file", tmp_path / "link"
    file.write_text("mine")
    dangling.symlink_to(tmp_path / "nowhere")
    for place in (file, dangling):
        message = failure("new-plugin", "chip", "--output", place)
        assert "is there, and is no directory" in message
    assert file.read_text() == "mine"
    assert dangling.is_symlink()


def test_a_name_that_no_directory_can_have_is_refused(tmp_path: Path) -> None:
    assert "too long" in failure("new-plugin", "chip", "--output", tmp_path / ("x" * 300))


def test_a_place_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    message = failure("new-plugin", "chip", "--output", tmp_path / "file" / "new")
    assert "cannot be written" in message
    assert "Not a directory" in message


def test_nothing_half_written_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = Path.write_text

    def fails_later(path: Path, text: str, **how: str) -> int:
        if path.name == "backend.py":
            raise OSError(28, "No space left on device")
        return full(path, text, **how)

    monkeypatch.setattr(Path, "write_text", fails_later)
    message = failure("new-plugin", "chip", "--output", tmp_path / "new")
    assert "cannot be written" in message
    assert "No space left on device" in message
    assert not list(tmp_path.iterdir())


def test_an_empty_directory_is_filled_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = Path.rename

    def fails_later(path: Path, target: Path) -> Path:
        if path.name == "src":
            raise OSError(5, "Input/output error")
        return full(path, target)

    monkeypatch.setattr(Path, "rename", fails_later)
    assert "Input/output error" in failure("new-plugin", "chip", "--output", tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_failure_can_be_a_document(tmp_path: Path) -> None:
    outcome = mortise("new-plugin", "My-Chip", "--json")
    assert outcome.code == 2
    assert json.loads(outcome.stderr)["error"]["type"] == "NewPluginError"


def test_every_template_becomes_a_file() -> None:
    templates = Path(rendering.__file__).with_name("templates")
    names = {f"{name}{rendering.ENDING}" for name in rendering.FILES.values()}
    assert {path.name for path in templates.iterdir()} == names
