"""What ``mortise doctor`` finds: each thing that can be missing is one row with a remedy."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from typing import Any

import pytest
import torch

from mortise.errors import BackendUnusableError
from mortise.plugin import DoctorRequest, Finding, ReasonCode, Verdict
from mortise_cuda_common import doctor
from mortise_cuda_common.chip import Architecture
from mortise_cuda_common.options import CommonOptions


def findings(request: DoctorRequest, **options: Any) -> dict[str, Finding]:
    found = doctor.findings(request, CommonOptions(**options), Architecture.SM90)
    return {one.name: one for one in found}


ALONE = DoctorRequest(device=None)
SHARED = DoctorRequest(device=None, world_size=2)


@pytest.fixture
def sound(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which everything is installed."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(doctor.importlib.metadata, "version", lambda name: "3.6.0")
    monkeypatch.setattr(doctor.shutil, "which", lambda name, path: f"/usr/bin/{name}")
    monkeypatch.setattr(doctor.deep_gemm, "require_installed", lambda: "0.1.5.post1")
    monkeypatch.setattr(doctor.deep_ep, "require_installed", lambda: "1.2.1")


def refuse() -> str:
    raise BackendUnusableError("it is gone", reason=ReasonCode.IMPORT_FAILED, remedy="get it")


def test_a_sound_machine(sound: None) -> None:
    found = findings(SHARED)
    assert list(found) == ["torch", "triton", "DeepGEMM", "DeepEP"]
    assert {one.verdict for one in found.values()} == {Verdict.OK}


def test_an_emulated_chip_needs_nothing() -> None:
    (only,) = findings(DoctorRequest(device="emulated")).values()
    assert (only.verdict, only.found) == (Verdict.OK, "an emulated H100, which needs no library")


def test_a_torch_without_cuda(sound: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    torch_row = findings(ALONE)["torch"]
    assert torch_row.verdict is Verdict.FAIL
    assert "built without CUDA" in torch_row.found
    assert torch_row.remedy.startswith("install a torch")


def test_no_triton(sound: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(doctor.importlib.metadata, "version", missing)
    assert findings(ALONE)["triton"].verdict is Verdict.FAIL


def test_no_compiler_for_tritons_launchers(sound: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda name, path: None)
    row = findings(ALONE)["triton"]
    assert row.verdict is Verdict.NOTE
    assert "neither gcc nor clang is on PATH" in row.found
    assert row.remedy.startswith("install gcc")


@pytest.mark.parametrize(
    ("library", "row", "option", "demand"),
    [
        ("deep_gemm", "DeepGEMM", "runner", "deep_gemm"),
        ("deep_ep", "DeepEP", "exchange", "deep_ep"),
    ],
)
def test_a_library_that_is_missing_is_a_note_unless_it_is_demanded(
    sound: None,
    monkeypatch: pytest.MonkeyPatch,
    library: str,
    row: str,
    option: str,
    demand: str,
) -> None:
    monkeypatch.setattr(getattr(doctor, library), "require_installed", refuse)
    note = findings(SHARED)[row]
    assert (note.verdict, note.found, note.remedy) == (Verdict.NOTE, "it is gone", "get it")
    assert findings(SHARED, **{option: demand})[row].verdict is Verdict.FAIL


def test_what_is_not_wanted_is_not_looked_for(sound: None) -> None:
    found = findings(SHARED, runner="triton", indexer="triton", exchange="portable")
    assert list(found) == ["torch", "triton"]
    assert "DeepEP" not in findings(ALONE)
