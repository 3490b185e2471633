"""What is said of a machine's GPUs: each thing that can be missing, with what to do about it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mortise.errors import BackendUnusableError, ConfigError
from mortise.plugin import ReasonCode
from mortise_cuda_common.chip import Architecture
from mortise_cuda_common.device import chip_of, device_number, require_gpus

H200: dict[str, Any] = {
    "name": "NVIDIA H200",
    "major": 9,
    "minor": 0,
    "multi_processor_count": 132,
    "shared_memory_per_block_optin": 232_448,
}


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The GPUs that torch sees; a test adds them."""
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(seen))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(seen))
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda number: SimpleNamespace(**seen[number])
    )
    return seen


@pytest.mark.parametrize(
    ("device", "local_rank", "number"),
    [(None, 0, 0), (None, 3, 3), ("cuda", 2, 2), ("cuda:1", 2, 1)],
)
def test_the_process_takes_the_gpu_of_its_number_unless_one_is_named(
    device: str | None, local_rank: int, number: int
) -> None:
    assert device_number(device, "cuda_hopper", local_rank) == number


@pytest.mark.parametrize("device", ["cpu", "npu", "cuda:", "cuda:x", "cuda:-1", "emulate"])
def test_another_device_is_refused(device: str) -> None:
    with pytest.raises(ConfigError, match="backend cuda_hopper does not know") as caught:
        device_number(device, "cuda_hopper", 0)
    assert "cuda:N" in str(caught.value)


def test_a_torch_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(BackendUnusableError, match="is built without CUDA") as caught:
        require_gpus()
    assert caught.value.reason is ReasonCode.IMPORT_FAILED
    assert 'device = "emulated"' in str(caught.value.remedy)


def test_no_gpu(gpus: list[dict[str, Any]]) -> None:
    with pytest.raises(BackendUnusableError, match="sees no GPU") as caught:
        chip_of(0, [Architecture.SM90])
    assert caught.value.reason is ReasonCode.DEVICE_ABSENT
    assert "nvidia-smi" in str(caught.value.remedy)


def test_too_few_gpus(gpus: list[dict[str, Any]]) -> None:
    gpus.append(H200)
    with pytest.raises(BackendUnusableError, match="no device cuda:1: torch sees 1") as caught:
        chip_of(1, [Architecture.SM90])
    assert caught.value.reason is ReasonCode.DEVICE_ABSENT


def test_a_gpu_of_another_generation(gpus: list[dict[str, Any]]) -> None:
    gpus.append({**H200, "name": "NVIDIA A100", "major": 8})
    with pytest.raises(BackendUnusableError, match="cuda:0 is NVIDIA A100, sm_80") as caught:
        chip_of(0, [Architecture.SM100, Architecture.SM103])
    assert caught.value.reason is ReasonCode.ARCH_MISMATCH
    assert "sm_100 or sm_103" in str(caught.value)


def test_a_gpu_that_fits(gpus: list[dict[str, Any]]) -> None:
    gpus.append(H200)
    chip = chip_of(0, [Architecture.SM90])
    assert (chip.name, chip.architecture) == ("NVIDIA H200", Architecture.SM90)
    assert (chip.num_sms, chip.shared_memory) == (132, 232_448)
