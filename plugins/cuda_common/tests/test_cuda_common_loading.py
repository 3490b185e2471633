"""What a role computes with: the emulation where it is asked for, DeepGEMM where it can be had."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch

from mortise.errors import BackendUnusableError, ConfigError
from mortise.plugin import BindContext, ModelRole, ReasonCode
from mortise_cuda_common import loading
from mortise_cuda_common.chip import EMULATED, Architecture
from mortise_cuda_common.libraries.deep_gemm import DeepGEMM
from mortise_cuda_common.options import CommonOptions
from mortise_cuda_common.programs.emulated import EmulatedPrograms

if TYPE_CHECKING:
    from mortise_cuda_common.runtime import Runtime

CHIP = EMULATED[Architecture.SM90]
MISSING = BackendUnusableError(
    "deep_gemm is not installed", reason=ReasonCode.IMPORT_FAILED, remedy="install it"
)


def load(device: str | None, **options: Any) -> Runtime:
    context = BindContext(role=ModelRole.MAIN, device=device, engine_version="0.1.0")
    chosen = CommonOptions(**options)
    return loading.load_runtime(
        "cuda_hopper", [Architecture.SM90], context, chosen, Architecture.SM90
    )


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that fits, with Triton and without DeepGEMM."""
    monkeypatch.setattr(loading, "chip_of", lambda number, wanted: CHIP)
    monkeypatch.setattr(loading, "CompiledPrograms", lambda *device: EmulatedPrograms())
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(DeepGEMM, "load", _refuse)
    monkeypatch.setattr(DeepGEMM, "imported_version", _refuse)


def _refuse(*arguments: object) -> None:
    raise MISSING


def test_an_emulated_chip_has_an_emulated_deep_gemm_unless_triton_is_chosen() -> None:
    runtime = load("emulated")
    assert (runtime.emulated, runtime.chip, runtime.device.type) == (True, CHIP, "cpu")
    assert runtime.deep_gemm is not None
    without = load("emulated", runner="triton", indexer="triton")
    assert without.deep_gemm is None
    assert without.no_deep_gemm == "the configuration chooses Triton"


def test_without_deep_gemm_the_programs_serve_and_that_is_told(gpu: None) -> None:
    with pytest.warns(RuntimeWarning, match=r"DeepGEMM is not used.*is not installed \(install it"):
        runtime = load("cuda")
    assert (runtime.emulated, runtime.deep_gemm) == (False, None)
    assert runtime.device == torch.device("cuda", 0)
    assert runtime.no_deep_gemm == "deep_gemm is not installed"


@pytest.mark.parametrize("option", ["runner", "indexer"])
def test_without_a_deep_gemm_that_is_demanded_nothing_serves(gpu: None, option: str) -> None:
    with pytest.raises(BackendUnusableError, match="deep_gemm is not installed"):
        load(None, **{option: "deep_gemm"})


def test_deep_gemm_is_not_looked_for_where_triton_is_chosen(gpu: None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load(None, runner="triton", indexer="triton").deep_gemm is None


def test_another_device_is_refused_before_anything_is_loaded() -> None:
    with pytest.raises(ConfigError, match="device is 'npu'"):
        load("npu")


def test_a_probe_tells_of_chip_and_library(gpu: None) -> None:
    found = loading.probe([Architecture.SM90])
    assert (found.found, found.arch) == (True, "sm_90")
    assert found.reason == (
        "torch sees H100; DeepGEMM cannot be used: deep_gemm is not installed (install it)"
    )
