"""The emulated DeepGEMM scores keys as its formula says, and hangs, faults and pads as a chip."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plugins.cuda_common.tests.deep_gemm_cases import BLACKWELL, CHIPS, HOPPER, LIBRARIES, plain

from mortise.formats import fp8
from mortise_cuda_common import schedule
from mortise_cuda_common.emulator.deep_gemm.fork import ForkDeepGEMM
from mortise_cuda_common.emulator.deep_gemm.paged_schedule import sm90_entries, sm100_entries
from mortise_cuda_common.emulator.deep_gemm.upstream import UpstreamDeepGEMM

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mortise_cuda_common.chip import Chip

HEADS, DIM, BLOCK = 32, 32, 64


@dataclass(frozen=True)
class Case:
    """A launch, and what it should give where a row sees a key."""

    q: torch.Tensor
    kv: torch.Tensor
    weights: torch.Tensor
    lens: torch.Tensor
    table: torch.Tensor
    exact: torch.Tensor

    @property
    def columns(self) -> int:
        return self.exact.shape[1]

    @property
    def visible(self) -> torch.Tensor:
        return torch.arange(self.columns) < self.lens.reshape(-1, 1)

    def launch(self, library: Any, schedule: torch.Tensor | None = None) -> torch.Tensor:
        plan = self.plan(library) if schedule is None else schedule
        logits: torch.Tensor = library.fp8_paged_mqa_logits(
            self.q, self.kv, self.weights, self.lens, self.table, plan, self.columns, False
        )
        return logits

    def plan(self, library: Any) -> torch.Tensor:
        plan: torch.Tensor = library.get_paged_mqa_logits_metadata(
            self.lens, BLOCK, library.get_num_sms()
        )
        return plan


def case(lens: Sequence[int], next_n: int = 1) -> Case:
    batch, longest = len(lens), max(*lens, 1)
    pages_of_row = -(-longest // BLOCK)
    pages = batch * pages_of_row
    q = fp8.to_e4m3(plain(batch, next_n, HEADS, DIM))
    keys = fp8.to_e4m3(plain(pages, BLOCK, DIM, seed=1))
    scale = plain(pages, BLOCK, seed=2).abs()
    weights = plain(batch * next_n, HEADS, seed=3)
    table = torch.randperm(pages, generator=torch.Generator().manual_seed(4))
    table = table.reshape(batch, pages_of_row).int()
    fused = torch.cat([keys.flatten(1).view(torch.uint8), scale.view(torch.uint8)], 1)
    own = keys[table.long()].flatten(1, 2).double()
    dots = torch.einsum("bnhd,bkd->bnhk", q.double(), own)
    weighted = dots.relu() * weights.double().reshape(batch, next_n, HEADS, 1)
    exact = weighted.sum(2) * scale[table.long()].flatten(1, 2).double().unsqueeze(1)
    seen = torch.tensor(lens, dtype=torch.int32).unsqueeze(1) + torch.arange(1 - next_n, 1).int()
    return Case(
        q=q,
        kv=fused.reshape(pages, BLOCK, 1, DIM + 4),
        weights=weights,
        lens=seen.clamp(min=1),
        table=table,
        exact=exact.flatten(0, 1)[:, :longest],
    )


def library(chip: Chip, num_sms: int = 5, kind: type = ForkDeepGEMM) -> Any:
    made = kind(chip)
    made.set_num_sms(num_sms)
    return made


@pytest.mark.parametrize("kind", LIBRARIES)
@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.name)
@pytest.mark.parametrize("next_n", [1, 2])
def test_scores_of_pages(chip: Chip, next_n: int, kind: type) -> None:
    one = case([700, 3, 64, 257], next_n)
    logits = one.launch(library(chip, kind=kind))
    torch.testing.assert_close(
        logits[one.visible].double(), one.exact[one.visible], rtol=1e-5, atol=1e-5
    )
    assert logits[~one.visible].isnan().all()
    assert logits.shape == one.exact.shape
    assert logits.stride(0) == 768  # 700 rounded up to splits


def test_blackwell_takes_any_number_of_queries_and_hopper_two() -> None:
    one = case([300, 40], 3)
    logits = one.launch(library(BLACKWELL))
    assert torch.allclose(logits[one.visible].double(), one.exact[one.visible], atol=1e-4)
    with pytest.raises(RuntimeError, match="next_n == 1 or next_n == 2"):
        one.launch(library(HOPPER))


@settings(max_examples=40, deadline=None)
@given(
    lens=st.lists(st.integers(1, 3000), min_size=1, max_size=40),
    next_n=st.integers(1, 4),
    num_sms=st.integers(1, 140),
)
def test_the_plan_is_that_of_the_other_writer(lens: list[int], next_n: int, num_sms: int) -> None:
    lens_RN = torch.tensor(lens, dtype=torch.int32).unsqueeze(1).expand(-1, next_n)
    assert sm90_entries(lens, next_n, num_sms) == [
        tuple(entry) for entry in schedule.sm90_schedule(lens_RN, num_sms).tolist()
    ]
    assert sm100_entries(lens, next_n, num_sms) == [
        tuple(entry) for entry in schedule.sm100_schedule(lens_RN, num_sms).tolist()
    ]


@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.name)
def test_shorter_lengths_than_planned_never_end(chip: Chip) -> None:
    planned, launched = case([3000, 3000]), case([3000, 300])
    gpu = library(chip)
    with pytest.raises(RuntimeError, match="would never end"):
        replace(planned, lens=launched.lens).launch(gpu, planned.plan(gpu))


@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.name)
def test_longer_lengths_than_planned_are_scored_by_whoever_ends_the_row(chip: Chip) -> None:
    planned, launched = case([300, 900]), case([900, 2000])
    logits = launched.launch(library(chip), planned.plan(library(chip)))
    seen = launched.visible
    assert torch.allclose(logits[seen].double(), launched.exact[seen], atol=1e-4)


@pytest.mark.parametrize("rows", [32, 64])
def test_hopper_faults_on_zeros_alone(rows: int) -> None:
    lens = torch.zeros(rows, 1, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        library(HOPPER).get_paged_mqa_logits_metadata(lens, BLOCK, 5)
    plan = library(HOPPER).get_paged_mqa_logits_metadata(lens[:-1], BLOCK, 5)
    assert plan.tolist() == [[rows - 1, 0]] * 6
    plan = library(BLACKWELL).get_paged_mqa_logits_metadata(lens, BLOCK, 5)
    assert plan.tolist() == [[rows, 0]] * 6


def test_lengths_are_of_two_dense_dimensions() -> None:
    gpu = library(HOPPER)
    lens = torch.ones(4, 2, dtype=torch.int32)
    for wrong, text in (
        (lens[:, 0], "context_lens.dim"),
        (lens[:, :1], "is_contiguous"),
        (lens.long(), "torch.int32"),
    ):
        with pytest.raises(RuntimeError, match=text):
            gpu.get_paged_mqa_logits_metadata(wrong, BLOCK, 5)
    with pytest.raises(RuntimeError, match="block_kv == 64"):
        gpu.get_paged_mqa_logits_metadata(lens, 32, 5)
    library(BLACKWELL).get_paged_mqa_logits_metadata(lens, 32, 5)


@pytest.mark.parametrize(("chip", "most"), [(HOPPER, 58112), (BLACKWELL, 29056)])
def test_requests_that_the_planner_cannot_hold(chip: Chip, most: int) -> None:
    lens = torch.ones(most + 1, 1, dtype=torch.int32)
    library(chip).get_paged_mqa_logits_metadata(lens[:-1], BLOCK, 1)
    with pytest.raises(RuntimeError, match="smem_size <= smem_capacity"):
        library(chip).get_paged_mqa_logits_metadata(lens, BLOCK, 1)


def test_the_vendors_assertions_on_a_launch() -> None:
    one, gpu = case([70, 30]), library(HOPPER)
    wrong: list[tuple[Case, str]] = [
        (replace(one, q=one.q[:, :, :16].contiguous()), "num_heads == 32 or num_heads == 64"),
        (replace(one, q=one.q.float()), "torch.float8_e4m3fn"),
        (replace(one, kv=one.kv[..., :-1]), "head_dim_with_sf == head_dim"),
        (replace(one, kv=one.kv.view(torch.int8)), "torch.uint8"),
        (replace(one, weights=one.weights[:1]), "_batch_size_next_n"),
        (replace(one, table=one.table[:1]), "_batch_size == batch_size"),
        (replace(one, lens=one.lens[:1]), "batch_size == __batch_size"),
        (replace(one, table=one.table + 9), "block table names pages"),
        (replace(one, table=one.table[:, :1]), "token 69 is in no page"),
    ]
    plan = one.plan(gpu)
    for changed, text in wrong:
        with pytest.raises(RuntimeError, match=text):
            changed.launch(gpu, plan)
    with pytest.raises(RuntimeError, match="_schedule_meta_size == num_sms"):
        one.launch(gpu, plan[:-1])
    with pytest.raises(RuntimeError, match="not is_context_lens_2d"):
        gpu.fp8_paged_mqa_logits(
            one.q, one.kv, one.weights, one.lens, one.table, plan, one.columns, True
        )


@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.name)
def test_scores_of_dense_keys(chip: Chip) -> None:
    q, keys = fp8.to_e4m3(plain(5, HEADS, DIM)), fp8.to_e4m3(plain(40, DIM, seed=1))
    scale, weights = plain(40, seed=2).abs(), plain(5, HEADS, seed=3)
    start = torch.tensor([0, 3, 0, 39, 7], dtype=torch.int32)
    end = torch.tensor([40, 9, 0, 40, 30], dtype=torch.int32)
    dots = torch.einsum("shd,kd->shk", q.double(), keys.double()).relu()
    exact = (dots * weights.double().unsqueeze(-1)).sum(1) * scale.double()
    places = torch.arange(40)
    mine = (places >= start.unsqueeze(1)) & (places < end.unsqueeze(1))
    gpu = UpstreamDeepGEMM(chip)
    cleaned = gpu.fp8_mqa_logits(q, (keys, scale), weights, start, end)
    assert torch.allclose(cleaned[mine].double(), exact[mine], atol=1e-4)
    assert cleaned[~mine].isneginf().all()
    assert cleaned.stride(0) == 512  # 40 and a tile of 256, rounded up
    fork = ForkDeepGEMM(chip).fp8_mqa_logits(q, (keys, scale), weights, start, end)
    assert torch.equal(fork[mine], cleaned[mine])
    assert fork[~mine].isnan().all()
    own = gpu.fp8_mqa_logits(q, (keys, scale), weights, start, end, False, 23)
    assert torch.equal(own[4], cleaned[4, 7:30])
    with pytest.raises(RuntimeError, match="not clean_logits"):
        gpu.fp8_mqa_logits(q, (keys, scale), weights, start, end, True, 23)
