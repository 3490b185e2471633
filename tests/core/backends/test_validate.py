from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from mortise.backends import Candidate, Stage, discover_backends
from mortise.backends.discover import engine_version
from mortise.backends.manifest import Manifest
from mortise.backends.validate import validate
from mortise.spec.reasons import ReasonCode

if TYPE_CHECKING:
    from mortise.testing.distributions import FakeDistribution

ALL_PAIRED = {"prepare_expert_weights": 1, "quantized_moe_apply": 1}


def rows(name: str) -> list[Candidate]:
    return [row for row in discover_backends() if row.name == name]


@pytest.mark.parametrize(
    ("changes", "reason", "said"),
    [
        ({"name": "other"}, ReasonCode.MANIFEST_INVALID, "manifest 'other'"),
        ({"engine": ">=99"}, ReasonCode.ENGINE_INCOMPATIBLE, "needs mortise-core >=99"),
        (
            {"implements": {"qkv_spilt": 1}},
            ReasonCode.HOOK_UNKNOWN,
            "'qkv_spilt', which is no hook, did you mean 'qkv_split'?",
        ),
        (
            {"implements": {"qkv_split": 2}},
            ReasonCode.HOOK_VERSION_UNSUPPORTED,
            "version 2 of hook qkv_split, this core has 1",
        ),
        (
            {"implements": {"quantized_moe_apply": 1}},
            ReasonCode.MANIFEST_INVALID,
            "without prepare_expert_weights",
        ),
        (
            {"implements": {**ALL_PAIRED, "paged_mqa_metadata": 1}},
            ReasonCode.MANIFEST_INVALID,
            "without paged_mqa_logits",
        ),
        (
            {"status": "planned", "status_reason": "kernels are missing"},
            ReasonCode.CANNOT_SERVE_YET,
            "kernels are missing",
        ),
    ],
)
def test_a_row_says_what_stopped_it(
    installed: FakeDistribution, changes: dict[str, object], reason: ReasonCode, said: str
) -> None:
    installed.add_backend("toy", manifest=changes)
    (row,) = rows("toy")
    assert row.reason is reason
    assert said in row.explanation
    assert row.remedy


def test_an_engine_mismatch_names_both_versions(installed: FakeDistribution) -> None:
    installed.add_backend("toy", manifest={"engine": ">=99"})
    (row,) = rows("toy")
    assert engine_version() in row.explanation


@pytest.mark.parametrize(
    ("specifier", "version", "fits"),
    [
        (">=0.1,<0.2", "0.1.0", True),
        (">=0.1,<0.2", "0.2.0", False),
        ("<=0.24.0", "0.24.0+build.129", True),
        (">=0.1", "0.2.0rc1", True),
        (">=0.1", "0.2.0.dev3", True),
        (">=0.2", "0.2.0rc1", False),
    ],
)
def test_prereleases_count_and_local_versions_do_not(
    specifier: str, version: str, fits: bool
) -> None:
    manifest = Manifest(
        schema=1,
        name="toy",
        summary="a toy",
        object="toy:Toy",
        engine=specifier,
        implements={"qkv_split": 1},
    )
    row = Candidate(
        name="toy",
        distribution="mortise-toy",
        version="1",
        location="",
        entry="toy:backend.toml",
        manifest=manifest,
    )
    (validated,) = validate([row], version)
    assert validated.usable is fits


@pytest.mark.parametrize("name", ["Toy", "2toy", "to-y"])
def test_names_are_plain(installed: FakeDistribution, name: str) -> None:
    installed.add_backend(name, package="fake_plain")
    (row,) = rows(name)
    assert row.reason is ReasonCode.MANIFEST_INVALID
    assert repr(name) in row.explanation


@pytest.mark.parametrize("name", ["auto", "reference", "none"])
def test_reserved_names_are_the_cores(installed: FakeDistribution, name: str) -> None:
    installed.add_backend(name, distribution="mortise-squatter")
    (row,) = [row for row in rows(name) if row.distribution == "mortise-squatter"]
    assert row.reason is ReasonCode.MANIFEST_INVALID
    assert "reserved" in row.explanation
    assert all(row.usable for row in rows("reference") if row.distribution == "mortise-core")


def test_two_distributions_of_one_name_are_both_marked(
    installed: FakeDistribution, elsewhere: FakeDistribution
) -> None:
    installed.add_backend("toy", distribution="first", package="fake_first")
    elsewhere.add_backend("toy", distribution="second", package="fake_second")
    one, two = rows("toy")
    assert one.reason is two.reason is ReasonCode.NAME_DUPLICATE
    assert one.stage is Stage.COMPATIBLE
    assert two.provenance in one.explanation
    assert one.provenance in two.explanation
