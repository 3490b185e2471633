"""A launch on a GPU, as far as Triton gets without one: compiled, loaded and given to a driver."""

from __future__ import annotations

import importlib
import importlib.util
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from plugins.cuda_common.tests.interpreted import needs_triton

from mortise.plugin import BackendUnusableError, QKVLayout, QKVShape
from mortise_cuda_common import qkv
from mortise_cuda_common.chip import EMULATED, Architecture
from mortise_cuda_common.programs.compiled import CompiledPrograms
from mortise_cuda_common.runtime import Runtime

tl: Any = importlib.import_module("triton.language") if importlib.util.find_spec("triton") else None
SHAPE = QKVShape(
    num_key_heads=2,
    num_value_heads=4,
    key_head_dim=128,
    value_head_dim=128,
    layout=QKVLayout.INTERLEAVED,
)


class Driver:
    """Stands for the driver of one GPU: keeps what it is asked to load and to launch."""

    def __init__(self) -> None:
        self.launched: list[tuple[int, ...]] = []
        self.loaded: list[bytes] = []
        self.utils = SimpleNamespace(
            get_device_properties=lambda _: {"max_shared_mem": 232_448},
            load_binary=self.load,
        )

    def load(self, name: str, cubin: bytes, shared: int, device: int) -> tuple[Any, ...]:
        assert (name, shared, device) == ("split_kernel", 0, 0)
        self.loaded.append(cubin)
        return "module", "function", 32, 0, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        assert metadata.num_warps == 4

        def launch(*arguments: Any) -> None:
            self.launched.append(arguments[:4])

        return launch

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 7 + device

    def get_current_target(self) -> Any:
        return importlib.import_module("triton.backends.compiler").GPUTarget("cuda", 90, 32)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    found = Driver()
    monkeypatch.setattr(importlib.import_module("triton.runtime").driver, "_active", found)
    monkeypatch.setattr("torch.cuda.device", nullcontext)
    return found


def split(programs: CompiledPrograms, tokens: int, gap: int = 0) -> None:
    runtime = Runtime(
        chip=EMULATED[Architecture.SM90],
        device=torch.device("cpu"),
        emulated=False,
        programs=programs,
    )
    qkvz = torch.zeros(tokens, 1536 + gap, dtype=torch.bfloat16)[:, :1536]
    qkv.split(runtime, qkvz, torch.zeros(tokens, 8, dtype=torch.bfloat16), SHAPE)


@needs_triton
def test_a_program_is_compiled_once_whatever_the_number_of_tokens(driver: Driver) -> None:
    programs = CompiledPrograms()
    for tokens in (3, 1, 16, 17, 8192):
        split(programs, tokens)
    assert len(driver.loaded) == 1
    assert driver.launched == [(2 * blocks, 1, 1, 7) for blocks in (1, 1, 2, 3, 1024)]
    split(programs, 0)
    assert len(driver.launched) == 5
    # 16 bytes at a time are read from rows that are as far apart only.
    split(programs, 3, gap=3)
    assert len(driver.loaded) == 2


@needs_triton
def test_nothing_is_shared_by_two_roles(driver: Driver) -> None:
    for _ in range(2):
        split(CompiledPrograms(), 3)
    assert len(driver.loaded) == 2
    assert driver.loaded[0] == driver.loaded[1]


def test_without_triton_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(importlib.import_module("sys").modules, "triton", None)
    with pytest.raises(BackendUnusableError, match="ModuleNotFoundError") as refused:
        CompiledPrograms()
    assert refused.value.remedy is not None
    assert 'device = "emulated"' in refused.value.remedy
