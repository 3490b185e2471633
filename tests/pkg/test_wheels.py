"""Each distribution builds, holds its own package alone, and is found once installed."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser
from typing import TYPE_CHECKING

import pytest

from tests.pkg.installation import PROJECTS, REPOSITORY, pip

if TYPE_CHECKING:
    from pathlib import Path

PACKAGES = {
    "mortise_core": "mortise",
    "mortise_npu_ascend": "mortise_npu_ascend",
    "mortise_cuda_common": "mortise_cuda_common",
    "mortise_cuda_hopper": "mortise_cuda_hopper",
    "mortise_cuda_blackwell": "mortise_cuda_blackwell",
}
# Shared by backends, and none itself: without a manifest.
LIBRARIES = {"mortise_cuda_common"}
LISTING = """
import json, sys
sys.path.insert(0, sys.argv[1])
from mortise.backends.discover import discover_backends
print(json.dumps({row.name: [row.location, row.version] for row in discover_backends()}))
"""


def files_in(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def text_in(wheel: Path, end: str) -> str:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(end))
        return archive.read(name).decode()


def test_every_distribution_builds(wheels: dict[str, Path]) -> None:
    assert wheels.keys() == PACKAGES.keys()


@pytest.mark.parametrize("distribution", PACKAGES)
def test_a_wheel_holds_one_package_with_types_manifest_and_licence(
    wheels: dict[str, Path], distribution: str
) -> None:
    files, package = files_in(wheels[distribution]), PACKAGES[distribution]
    tops = {name.split("/")[0] for name in files}
    assert tops == {package, f"{distribution}-0.1.0.dist-info"}
    assert f"{package}/py.typed" in files
    manifest = (
        "mortise/reference/backend.toml" if package == "mortise" else f"{package}/backend.toml"
    )
    assert (manifest in files) is (distribution not in LIBRARIES)
    assert f"{distribution}-0.1.0.dist-info/licenses/LICENSE" in files


@pytest.mark.parametrize("distribution", PACKAGES)
def test_a_wheel_says_who_made_it_and_what_it_needs(
    wheels: dict[str, Path], distribution: str
) -> None:
    metadata = Parser().parsestr(text_in(wheels[distribution], "METADATA"))
    assert metadata["Name"].replace("-", "_") == distribution
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["Summary"]
    assert metadata.get_payload(), "a distribution brings its README"


def test_the_core_brings_the_built_in_model(wheels: dict[str, Path]) -> None:
    files = files_in(wheels["mortise_core"])
    for name in ("config.json", "tokenizer.json", "README.md"):
        assert any(
            file.startswith("mortise/assets/") and file.endswith(f"/{name}") for file in files
        )
    assert any(file.endswith(".safetensors") for file in files)
    assert wheels["mortise_core"].stat().st_size < 30 * 1024 * 1024


def test_the_core_brings_what_authors_of_backends_need(wheels: dict[str, Path]) -> None:
    files = set(files_in(wheels["mortise_core"]))
    sources = REPOSITORY / "core" / "src"
    for folder in ("conformance", "recording", "scaffold", "testing"):
        wanted = {
            path.relative_to(sources).as_posix()
            for path in (sources / "mortise" / folder).rglob("*")
            if path.is_file() and path.suffix != ".pyc"
        }
        assert wanted
        assert wanted <= files
    assert any(name.endswith("/pyproject.toml.template") for name in files)
    metadata = Parser().parsestr(text_in(wheels["mortise_core"], "METADATA"))
    assert "conformance" in metadata.get_all("Provides-Extra", [])


@pytest.mark.parametrize(
    ("distribution", "manifest"),
    [
        ("mortise_toy", "mortise_toy/backend.toml"),
        ("mortise_fresh_chip", "mortise_fresh_chip/backend.toml"),
    ],
)
def test_a_wheel_of_others_holds_its_manifest_and_no_tests(
    third_party: dict[str, Path], distribution: str, manifest: str
) -> None:
    files = files_in(third_party[distribution])
    assert manifest in files
    assert f"{distribution}/py.typed" in files
    assert {name.split("/")[0] for name in files} == {
        distribution,
        f"{distribution}-0.1.0.dist-info",
    }


def test_installed_backends_are_listed(wheels: dict[str, Path], tmp_path: Path) -> None:
    pip("install", "--no-deps", "--target", tmp_path, *wheels.values())
    outcome = subprocess.run(
        [sys.executable, "-c", LISTING, str(tmp_path)], capture_output=True, text=True, check=True
    )
    rows = json.loads(outcome.stdout)
    tables = [
        tomllib.loads((project / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        for project in PROJECTS
    ]
    declared = {
        name
        for table in tables
        for name in table.get("entry-points", {}).get("mortise.backends", ())
    }
    assert rows.keys() == declared
    assert {tuple(row) for row in rows.values()} == {(str(tmp_path), "0.1.0")}
