"""Every job of the warm-up is a call that the backend takes, and nothing is launched twice."""

from __future__ import annotations

import inspect
import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tests.cli.command_line import mortise
from tests.fixtures.tiny_models import INDEXER, save_tiny

from mortise import LLM, EngineConfig, SamplingParams
from mortise.engine.warmup import warmup_request
from mortise.plugin import QKVLayout, QKVShape
from mortise_cuda_common import moe
from mortise_cuda_common.programs.emulated import EmulatedPrograms
from mortise_cuda_common.warmup import launches, sizes

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("most", "wanted"), [(1, (1,)), (2, (1, 2)), (5, (1, 2, 4, 5)), (8, (1, 2, 4, 8))]
)
def test_sizes_are_powers_of_two_and_the_largest(most: int, wanted: tuple[int, ...]) -> None:
    assert sizes(most) == wanted


def test_ahead_of_time_every_tile_of_deep_gemm_is_met() -> None:
    assert sizes(200, ahead=True) == (1, 2, 4, 8, 16, 32, 64, 128, 192, 200)
    assert set(sizes(200)) < set(sizes(200, ahead=True))


def quantised_model(folder: Path, mode: str, **options: str) -> LLM:
    plain = save_tiny(folder / "plain", **INDEXER, hidden_size=128, moe_intermediate_size=128)
    model = folder / "fp8"
    assert mortise("quantize", model, "--model", plain, "--scheme", "fp8-block").code == 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return LLM(
            EngineConfig(
                model=str(model),
                backend="cuda_hopper",
                device="emulated",
                dtype="bfloat16",
                cache={"max_num_tokens": 256},
                scheduler={"max_num_batched_tokens": 3, "max_num_seqs": 2},
                dispatch={"mode": mode, "max_tokens_per_rank": 4},
                backend_options={"cuda_hopper": options},
            )
        )


@pytest.mark.parametrize("mode", ["normal", "low_latency"])
def test_every_job_runs_and_no_two_are_the_same(tmp_path: Path, mode: str) -> None:
    llm = quantised_model(tmp_path, mode)
    request = warmup_request(llm.loaded, llm.resolved.config, ahead=True)
    backend = llm.loaded.bound.backend
    assert backend.warmup(request) == [], "an emulated chip compiles nothing"
    jobs = launches(backend, torch.device("cpu"), request)
    assert {job.name.split()[0] for job in jobs} == {"experts", "projection", "index"}
    distinct = {job.key: job for job in jobs}
    assert len(distinct) < len(jobs), "layers of one shape share what is compiled"
    for job in distinct.values():
        job.run()


def test_an_exchange_of_fixed_size_is_warmed_up_at_its_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slots as large as in service: they are compiled for, and larger ones fill the memory."""
    llm = quantised_model(tmp_path, "low_latency")
    apply, slots = moe.quantized_moe_apply, []

    def recorded(*arguments: Any) -> torch.Tensor:
        slots.append(arguments[1].rows.shape[1])
        return apply(*arguments)

    monkeypatch.setattr(moe, "quantized_moe_apply", recorded)
    asked = warmup_request(llm.loaded, llm.resolved.config, ahead=True)
    for world_size, most in ((1, 3), (4, 3), (1, 2048)):
        request = replace(asked, world_size=world_size, max_tokens=most)
        found = launches(llm.loaded.bound.backend, torch.device("cpu"), request)
        jobs = {job.key: job for job in found if job.name.startswith("experts")}
        assert {job.name.split(": ")[1] for job in jobs.values()} == {
            "1 tokens",
            f"{min(most, 4)} tokens",
        }
        slots.clear()
        for job in jobs.values():
            job.run()
        assert set(slots) == {4 * world_size}


@pytest.mark.parametrize("mode", ["normal", "low_latency"])
def test_a_warmed_up_model_launches_nothing_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """Nothing that Triton would compile then: by program, constants, formats, kinds of strides."""
    launch, seen = EmulatedPrograms.launch, set()

    def recorded(
        programs: EmulatedPrograms,
        source: Any,
        grid: int,
        arguments: Any,
        constants: Any,
        **how: int,
    ) -> None:
        names = inspect.signature(source).parameters
        compiled = (
            one.dtype if isinstance(one, torch.Tensor) else name.endswith("stride") and kind_of(one)
            for name, one in zip(names, arguments, strict=False)
        )
        seen.add((source, *compiled, *sorted(constants.items()), *sorted(how.items())))
        launch(programs, source, grid, arguments, constants, **how)

    llm = quantised_model(tmp_path, mode, runner="triton", indexer="triton")
    monkeypatch.setattr(EmulatedPrograms, "launch", recorded)
    request = warmup_request(llm.loaded, llm.resolved.config, ahead=False)
    jobs = launches(llm.loaded.bound.backend, torch.device("cpu"), request)
    for job in {job.key: job for job in jobs}.values():
        job.run()
    warmed = frozenset(seen)
    seen.clear()
    llm.generate([[1, 2, 3, 4, 5], [6, 7]], SamplingParams(max_tokens=3))
    assert seen
    assert not seen - warmed


def kind_of(stride: int) -> tuple[bool, bool]:
    return stride == 1, stride % 16 == 0


def test_splits_are_launched_too(tmp_path: Path) -> None:
    llm = LLM(
        EngineConfig(
            model=str(save_tiny(tmp_path / "plain")),
            backend="cuda_hopper",
            device="emulated",
            dtype="bfloat16",
            cache={"max_num_tokens": 256},
        )
    )
    shape = QKVShape(
        num_key_heads=2,
        num_value_heads=6,
        key_head_dim=8,
        value_head_dim=8,
        layout=QKVLayout.CONTIGUOUS,
    )
    request = warmup_request(llm.loaded, llm.resolved.config, ahead=False)
    request = replace(request, experts=(), linears=(), qkv_shapes=(shape,), max_tokens=2)
    jobs = launches(llm.loaded.bound.backend, torch.device("cpu"), request)
    assert [job.name for job in jobs if job.name.startswith("split")] == [
        "split of 2/6 heads: 1 tokens",
        "split of 2/6 heads: 2 tokens",
    ]
    for job in jobs:
        job.run()
