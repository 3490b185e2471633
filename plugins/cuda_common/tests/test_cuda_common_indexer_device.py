"""On a GPU the indexer's plans and scores are those of the emulation, in captured graphs too."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from plugins.cuda_common.tests.index_cases import (
    Case,
    by_definition,
    calc_diff,
    case,
    quantised_query,
    visible,
)

from mortise.errors import BackendUnusableError
from mortise.plugin import ForwardMode, refresh_paged_mqa_metadata
from mortise_cuda_common.chip import Architecture
from mortise_cuda_common.device import chip_of
from mortise_cuda_common.indexer import Indexer
from mortise_cuda_common.kernels import paged_mqa
from mortise_cuda_common.libraries.deep_gemm import DeepGEMM
from mortise_cuda_common.programs.compiled import CompiledPrograms
from mortise_cuda_common.programs.emulated import EmulatedPrograms
from mortise_cuda_common.runtime import Runtime
from mortise_cuda_common.schedule import sm90_schedule, sm100_schedule

pytestmark = pytest.mark.device

CUT_OFF = 2.0
"""Matrix units cut off what they add up, which is up to twice what rounding it off would be."""


@dataclass(frozen=True)
class Gpu:
    """One way of scoring on the GPU that is here."""

    indexer: Indexer
    runtime: Runtime

    @property
    def num_workers(self) -> int:
        return self.runtime.chip.num_sms


@pytest.fixture(scope="module", params=["triton", "deep_gemm"])
def gpu(request: pytest.FixtureRequest) -> Gpu:
    try:
        chip = chip_of(0, tuple(Architecture))
        device = torch.device("cuda", 0)
        deep_gemm = DeepGEMM.load(chip, device) if request.param == "deep_gemm" else None
        programs = CompiledPrograms()
    except BackendUnusableError as error:
        pytest.skip(f"nothing ran on a GPU by {request.param}: {error.what}")
    runtime = Runtime(
        chip=chip, device=device, emulated=False, programs=programs, deep_gemm=deep_gemm
    )
    return Gpu(Indexer(runtime, request.param), runtime)


def check_scores(gpu: Gpu, one: Case, found: torch.Tensor) -> None:
    """As their authors measure float8; bfloat16 within what sums in float32 may be off."""
    seen = visible(one, int(one.lens.max()))
    columns = seen.shape[1]
    scores = found[:, :columns].double().cpu().numpy()[seen]
    assert np.isfinite(scores).all()
    if one.pages.scales is None:
        expected = by_definition(one)
        off = abs(scores - expected.values[:, :columns][seen])
        assert (off <= CUT_OFF * expected.bound[:, :columns][seen]).all(), off.max()
        return
    expected = by_definition(one, query=quantised_query(one))
    assert calc_diff(scores, expected.values[:, :columns][seen]) < 5e-6


def skip_what_deep_gemm_does_not_take(gpu: Gpu, *, fp8: bool) -> None:
    if gpu.runtime.deep_gemm is not None and not fp8:
        pytest.skip("DeepGEMM takes float8 keys alone")


@pytest.mark.parametrize("mode", ForwardMode)
@pytest.mark.parametrize("next_n", [1, 2, 4])
@pytest.mark.parametrize("fp8", [True, False])
def test_scores_of_every_mode(gpu: Gpu, mode: ForwardMode, next_n: int, fp8: bool) -> None:
    skip_what_deep_gemm_does_not_take(gpu, fp8=fp8)
    lens = [list(range(last - next_n + 1, last + 1)) for last in (3000, 4, 64, 257, 256, 500)]
    one = case(lens, fp8=fp8, heads=64, dim=128, num_pages=100)
    there = one.on(gpu.runtime.device)
    check_scores(gpu, one, there.scores(gpu.indexer, gpu.num_workers, mode))


@pytest.mark.parametrize("rows", [1, 31, 32, 33, 64, 128])
@pytest.mark.parametrize("next_n", [1, 2])
def test_rows_without_keys(gpu: Gpu, rows: int, next_n: int) -> None:
    """An SM90 that is given these lengths themselves reads past its sums, or never ends."""
    for some in (0, 300):
        lens = [[0] * next_n] * (rows - 1) + [[some] * next_n]
        one = case(lens, fp8=True, heads=64, dim=128)
        found = one.on(gpu.runtime.device).scores(gpu.indexer, gpu.num_workers)
        torch.cuda.synchronize()
        assert len(found) == rows * next_n
        if some:
            check_scores(gpu, one, found)


def test_deep_gemm_plans_as_ours_do(gpu: Gpu) -> None:
    """Its own planner on the GPU, and the schedules in torch, also on the GPU."""
    deep_gemm = gpu.runtime.deep_gemm
    if deep_gemm is None:
        pytest.skip("this is about DeepGEMM")
    is_sm90 = gpu.runtime.chip.architecture is Architecture.SM90
    plan = sm90_schedule if is_sm90 else sm100_schedule
    rng = random.Random(3)
    # Few numbers of rows: the planner of SM90 is compiled for every 32 more.
    for rows in [1, 32, 33, 64] * 25:
        next_n = rng.choice([1, 2])
        last = [rng.randint(next_n, 9000) for _ in range(rows)]
        lens = torch.tensor(
            [list(range(length - next_n + 1, length + 1)) for length in last],
            dtype=torch.int32,
            device=gpu.runtime.device,
        )
        theirs = deep_gemm.paged_mqa_metadata(lens, 64, gpu.num_workers)
        assert torch.equal(theirs, plan(lens, gpu.num_workers))


@pytest.mark.parametrize("fp8", [True, False])
def test_a_captured_graph_is_replayed_after_a_refresh(gpu: Gpu, fp8: bool) -> None:
    """Captured with the longest lengths; every replay reads what the refresh left there."""
    skip_what_deep_gemm_does_not_take(gpu, fp8=fp8)
    longest = case([[3000]] * 6, fp8=fp8, heads=64, dim=128, num_pages=100)
    there = longest.on(gpu.runtime.device)
    plan = there.plan(gpu.indexer, gpu.num_workers)
    there.launch(gpu.indexer, plan)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = there.launch(gpu.indexer, plan)
    for lens in ([3000, 1, 64, 257, 0, 500], [5, 5, 5, 5, 5, 5], [0] * 6, [3000] * 6):
        now = replace(longest, lens=torch.tensor(lens, dtype=torch.int32).view(6, 1))
        fresh = now.on(gpu.runtime.device).plan(gpu.indexer, gpu.num_workers)
        plan = refresh_paged_mqa_metadata(plan, fresh, captured_context_len=3000)
        # Scores of fewer keys are the same numbers: what is left of the last launch must not count.
        result.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        if any(lens):
            check_scores(gpu, now, result)


def test_repeated_launches_give_the_same_bits(gpu: Gpu) -> None:
    one = case([[3000], [1], [700]], fp8=True, heads=64, dim=128).on(gpu.runtime.device)
    first = one.scores(gpu.indexer, gpu.num_workers)
    seen = torch.from_numpy(visible(one.on(torch.device("cpu")), 3000)).to(first.device)
    for _ in range(20):
        again = one.scores(gpu.indexer, gpu.num_workers)
        assert torch.equal(again[:, :3000][seen], first[:, :3000][seen])


@pytest.mark.parametrize(("heads", "padded", "dim"), [(64, 64, 128), (4, 32, 64), (3, 8, 48)])
def test_queries_are_quantised_as_on_the_emulated_chip(
    gpu: Gpu, heads: int, padded: int, dim: int
) -> None:
    """Bit for bit: one division each for scale and reciprocal, both rounded to nearest."""
    query_TND = (torch.randn(50, heads, dim) * torch.logspace(-6, 3, 50)[:, None, None]).bfloat16()
    query_TND[3] = 0
    weights_TN = torch.randn(50, heads)
    emulated = paged_mqa.quantise_queries(EmulatedPrograms(), query_TND, weights_TN, padded)
    device = gpu.runtime.device
    compiled = paged_mqa.quantise_queries(
        gpu.runtime.programs, query_TND.to(device), weights_TN.to(device), padded
    )
    for ours, theirs in zip(emulated, compiled, strict=True):
        assert torch.equal(ours.view(torch.uint8), theirs.cpu().view(torch.uint8))
