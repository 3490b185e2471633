from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

from mortise.backends import Stage, discover_backends
from mortise.backends.discover import engine_version
from mortise.spec.reasons import ReasonCode

if TYPE_CHECKING:
    from pathlib import Path

    from mortise.backends import Candidate
    from mortise.testing.distributions import FakeDistribution

LISTING = """
import json, sys
sys.path.insert(0, sys.argv[1])
import mortise.backends
before = set(sys.modules)
rows = mortise.backends.discover_backends()
imported = sorted(set(sys.modules) - before)
print(json.dumps({"rows": [[row.name, row.reason] for row in rows], "imported": imported}))
"""


def row(name: str) -> Candidate:
    (found,) = [row for row in discover_backends() if row.name == name]
    return found


def test_the_reference_is_installed() -> None:
    found = row("reference")
    assert found.usable
    assert found.stage is Stage.COMPATIBLE
    assert (found.distribution, found.version) == ("mortise-core", engine_version())


def test_a_backend_is_found_with_its_place(installed: FakeDistribution) -> None:
    folder = installed.add_backend("toy", version="2.5")
    found = row("toy")
    assert (found.distribution, found.version) == ("mortise-toy", "2.5")
    assert found.location == str(installed.folder)
    assert found.manifest_path == str(folder / "backend.toml")
    assert found.usable


def test_listing_runs_no_plugin_code(tmp_path: Path) -> None:
    from mortise.testing.distributions import FakeDistribution

    poison = "raise SystemExit('listing imported a plugin')"
    distributions = FakeDistribution(tmp_path)
    distributions.add_backend("poisoned", init=poison, code=poison)
    nested = distributions.add_backend(
        "nested", init=poison, code=poison, entry="fake_nested.inner:backend.toml"
    )
    (nested / "inner").mkdir()
    (nested / "backend.toml").rename(nested / "inner" / "backend.toml")
    child = subprocess.run(
        [sys.executable, "-c", LISTING, str(tmp_path)], capture_output=True, text=True, check=True
    )
    seen = json.loads(child.stdout)
    assert ["poisoned", None] in seen["rows"]
    assert ["nested", None] in seen["rows"]
    assert [name for name in seen["imported"] if name.startswith(("fake_", "torch"))] == []
    assert "mortise.reference" not in seen["imported"]


def test_one_bad_manifest_hides_nobody(installed: FakeDistribution) -> None:
    installed.add_backend("bad", manifest="schema = ")
    installed.add_backend("good")
    assert row("good").usable
    assert row("bad").reason is ReasonCode.MANIFEST_INVALID
    assert "not TOML" in row("bad").explanation


def test_a_manifest_that_is_no_text(installed: FakeDistribution) -> None:
    folder = installed.add_backend("bad")
    (folder / "backend.toml").write_bytes(b"\xff\xfe")
    assert row("bad").reason is ReasonCode.MANIFEST_INVALID
    assert "cannot be read" in row("bad").explanation


def test_broken_metadata_hides_nobody(installed: FakeDistribution) -> None:
    installed.add_metadata(
        "mortise-broken", "1", entry_points="[mortise.backends]\nno equals sign\n"
    )
    installed.add_backend("good")
    assert row("good").usable
    broken = row("mortise-broken")
    assert broken.reason is ReasonCode.MANIFEST_INVALID
    assert "entry_points.txt" in broken.explanation


def test_an_entry_point_to_an_object_is_refused(installed: FakeDistribution) -> None:
    installed.add_backend("old", entry="fake_old.backend:FakeBackend")
    assert row("old").reason is ReasonCode.MANIFEST_INVALID
    assert "'fake_old.backend:FakeBackend'" in row("old").explanation


def test_an_entry_point_cannot_leave_its_package(installed: FakeDistribution) -> None:
    installed.add_backend("sly", entry="fake_sly:../../secrets.toml")
    assert row("sly").reason is ReasonCode.MANIFEST_INVALID


def test_a_missing_manifest_is_said(installed: FakeDistribution) -> None:
    (installed.add_backend("lost") / "backend.toml").unlink()
    assert row("lost").reason is ReasonCode.MANIFEST_INVALID
    assert "no file backend.toml in package fake_lost" in row("lost").explanation


def test_a_missing_package_is_said(installed: FakeDistribution) -> None:
    installed.add_backend("gone", entry="not_installed_anywhere:backend.toml")
    assert "in package not_installed_anywhere" in row("gone").explanation


def test_an_editable_install_is_found(
    installed: FakeDistribution, elsewhere: FakeDistribution
) -> None:
    """Its metadata lies in one folder, its package in another one on the path."""
    package = installed.add_backend("editable")
    package.rename(elsewhere.folder / package.name)
    found = row("editable")
    assert found.usable
    assert found.manifest_path == str(elsewhere.folder / package.name / "backend.toml")


def test_copies_of_one_distribution_collapse_with_a_note(
    installed: FakeDistribution, elsewhere: FakeDistribution
) -> None:
    installed.add_backend("twice", version="1.0")
    elsewhere.add_backend("twice", version="1.1")
    found = row("twice")
    assert found.usable
    assert found.version == "1.1", "what was put first on the path counts"
    (note,) = found.notes
    assert "version 1.0" in note
    assert str(installed.folder) in note


def test_a_folder_that_is_twice_on_the_path_is_no_news(installed: FakeDistribution) -> None:
    installed.add_backend("toy")
    sys.path.append(str(installed.folder))
    try:
        assert row("toy").notes == ()
    finally:
        sys.path.pop()
