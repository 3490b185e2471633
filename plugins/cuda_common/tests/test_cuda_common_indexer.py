"""The indexer plans and scores what it was given, or refuses it before anything is launched."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plugins.cuda_common.tests.index_cases import (
    BLOCK,
    Case,
    RecordedPrograms,
    by_definition,
    calc_diff,
    case,
    dequantised,
    fuse,
    quantised_query,
    runtime,
    visible,
)

from mortise.errors import ConfigError, ContractError, StaleScheduleError
from mortise.plugin import ForwardMode, IndexKeyPages, refresh_paged_mqa_metadata
from mortise.reference import attention as reference
from mortise_cuda_common.chip import Architecture
from mortise_cuda_common.index_launch import fused_kv
from mortise_cuda_common.indexer import Indexer
from mortise_cuda_common.schedule import sm90_schedule, sm90_walk, sm100_schedule, sm100_walk

CHIPS = (Architecture.SM90, Architecture.SM100)


@dataclass(frozen=True)
class Way:
    """What computes, and on which chip."""

    architecture: Architecture
    deep_gemm: bool

    def __str__(self) -> str:
        return f"{self.architecture}-{'deep_gemm' if self.deep_gemm else 'triton'}"

    @property
    def num_workers(self) -> int:
        """DeepGEMM plans for the chip; programs for any number."""
        return runtime(self.architecture).chip.num_sms if self.deep_gemm else 5

    def indexer(self, programs: RecordedPrograms | None = None) -> Indexer:
        chip = runtime(self.architecture, deep_gemm=self.deep_gemm, programs=programs)
        return Indexer(chip, "deep_gemm" if self.deep_gemm else "triton")


WAYS = [Way(chip, deep_gemm) for chip in CHIPS for deep_gemm in (False, True)]
EVERY_WAY = pytest.mark.parametrize("way", WAYS, ids=str)


def check_scores(one: Case, found: torch.Tensor) -> None:
    """Bfloat16 keys exactly but for float32 sums; float8 ones also as their authors measure."""
    columns = one.table.shape[1] * BLOCK
    assert found.dtype is torch.float32
    assert len(found) == len(one.weights)
    assert found.shape[1] >= int(one.lens.max())
    seen = visible(one, columns)
    width = min(columns, found.shape[1])
    scores = found[:, :width].double().numpy()[seen[:, :width]]
    is_quantised = one.pages.scales is not None
    expected = by_definition(one, query=quantised_query(one) if is_quantised else None)
    off = abs(scores - expected.values[seen])
    assert (off <= expected.bound[seen]).all(), off.max()
    if is_quantised and len(scores) >= 256:
        assert calc_diff(scores, expected.values[seen]) < 5e-6


@EVERY_WAY
@pytest.mark.parametrize("mode", ForwardMode)
@pytest.mark.parametrize("next_n", [1, 2, 3, 4])
def test_scores_of_every_mode_are_those_of_the_definition(
    way: Way, mode: ForwardMode, next_n: int
) -> None:
    lens = [list(range(last - next_n + 1, last + 1)) for last in (700, 4, 64, 257, 256, 500)]
    one = case(lens, fp8=True, heads=8, dim=64, seed=next_n)
    metadata = one.plan(way.indexer(), way.num_workers, mode)
    assert (metadata.mode, metadata.rows, metadata.next_n) == (mode, 6, next_n)
    assert torch.equal(metadata.context_lens, one.lens)
    check_scores(one, one.launch(way.indexer(), metadata))


@settings(max_examples=40)
@given(data=st.data(), chip=st.sampled_from(CHIPS), fp8=st.booleans())
def test_any_launch_of_our_own_program(data: st.DataObject, chip: Architecture, fp8: bool) -> None:
    next_n = data.draw(st.integers(1, 3))
    row = st.lists(st.integers(0, 400), min_size=next_n, max_size=next_n)
    one = case(
        data.draw(st.lists(row, min_size=1, max_size=4).filter(lambda lens: max(map(max, lens)))),
        heads=data.draw(st.sampled_from([1, 3, 4, 16, 20])),
        dim=data.draw(st.sampled_from([16, 32, 48, 128])),
        fp8=fp8,
        seed=data.draw(st.integers(0, 1000)),
    )
    indexer = Indexer(runtime(chip), "triton")
    check_scores(one, one.scores(indexer, data.draw(st.integers(1, 9))))


@settings(max_examples=25)
@given(data=st.data(), chip=st.sampled_from(CHIPS))
def test_any_launch_of_deep_gemm(data: st.DataObject, chip: Architecture) -> None:
    next_n = data.draw(st.integers(1, 4))
    row = st.lists(st.integers(0, 400), min_size=next_n, max_size=next_n)
    one = case(
        data.draw(st.lists(row, min_size=1, max_size=4).filter(lambda lens: max(map(max, lens)))),
        heads=data.draw(st.sampled_from([1, 3, 8, 33, 64])),
        dim=data.draw(st.sampled_from([32, 64, 128])),
        fp8=True,
        seed=data.draw(st.integers(0, 1000)),
    )
    way = Way(chip, deep_gemm=True)
    check_scores(one, one.scores(way.indexer(), way.num_workers))


@EVERY_WAY
@pytest.mark.parametrize("rows", [1, 31, 32, 33, 64, 128])
@pytest.mark.parametrize("next_n", [1, 2])
def test_rows_without_keys_are_planned_as_rows_of_one(way: Way, rows: int, next_n: int) -> None:
    """All of them zero, where SM90's planner reads past its sums; and some of them."""
    walk = sm100_walk if way.deep_gemm and way.architecture.is_blackwell else sm90_walk
    tokens = next_n if way.deep_gemm else 1
    for some in (0, 300):
        lens = [[0] * next_n] * (rows - 1) + [[some] * next_n]
        one = case(lens, fp8=True)
        metadata = one.plan(way.indexer(), way.num_workers)
        assert metadata.schedule is not None and metadata.planned_lens is not None
        assert metadata.planned_lens.tolist() == [[max(each, 1) for each in row] for row in lens]
        assert metadata.context_lens.tolist() == lens
        planned = metadata.planned_lens.view(-1, tokens)
        done = list(chain.from_iterable(walk(metadata.schedule, planned)))
        splits = [max(-(-int(row[-1]) // 256), 1) for row in planned]
        assert done == [
            (row * tokens, split) for row, count in enumerate(splits) for split in range(count)
        ]
        scores = one.launch(way.indexer(), metadata)
        assert scores.shape[0] == rows * next_n
        if some:
            check_scores(one, scores)


@EVERY_WAY
@pytest.mark.parametrize("mode", ForwardMode)
def test_no_row_and_no_key_launch_nothing(way: Way, mode: ForwardMode) -> None:
    programs = RecordedPrograms()
    none, blank = case([], fp8=True), case([[0], [0]], fp8=True, tables=[[], []])
    assert none.scores(way.indexer(programs), way.num_workers, mode).shape == (0, 0)
    assert blank.scores(way.indexer(programs), way.num_workers, mode).shape == (2, 0)
    assert not programs.launches


@EVERY_WAY
def test_the_schedule_is_that_of_the_planned_lengths(way: Way) -> None:
    """Also where DeepGEMM was given more rows than there are, so that it is compiled less often."""
    is_sm100 = way.deep_gemm and way.architecture.is_blackwell
    plan = sm100_schedule if is_sm100 else sm90_schedule
    rng = random.Random(4)
    for rows in [1, 2, 31, 32, 33, 64, 100, 129, *range(3, 30)]:
        next_n = rng.choice([1, 2, 3, 4])
        last = [rng.randint(0, 3000) for _ in range(rows)]
        lens = [[max(length - back, 0) for back in range(next_n)][::-1] for length in last]
        metadata = way.indexer().metadata(
            torch.tensor(lens, dtype=torch.int32), BLOCK, way.num_workers, ForwardMode.DECODE
        )
        native = way.deep_gemm and (is_sm100 or next_n <= 2)
        assert metadata.planned_lens is not None and metadata.schedule is not None
        planned = metadata.planned_lens.view(-1, next_n if native else 1)
        assert torch.equal(metadata.schedule, plan(planned, way.num_workers))


def test_planned_lengths_are_followed_by_one_that_idle_workers_may_read() -> None:
    metadata = case([[5], [7]]).plan(Way(Architecture.SM90, deep_gemm=False).indexer(), 4)
    assert metadata.planned_lens is not None
    assert metadata.planned_lens.untyped_storage().nbytes() == 3 * 4
    assert metadata.planned_lens.as_strided((3,), (1,)).tolist() == [5, 7, 1]


def test_the_longest_token_of_a_row_counts_for_all_of_it() -> None:
    """DeepGEMM looks at the last length alone; rows that draft are usually in that order."""
    way = Way(Architecture.SM90, deep_gemm=True)
    one = case([[600, 10], [3, 300]], fp8=True)
    metadata = one.plan(way.indexer(), way.num_workers, ForwardMode.TARGET_VERIFY)
    assert metadata.planned_lens is not None
    assert metadata.planned_lens.tolist() == [[600, 600], [3, 300]]
    assert metadata.context_lens.tolist() == [[600, 10], [3, 300]]
    check_scores(one, one.launch(way.indexer(), metadata))


@pytest.mark.parametrize("chip", CHIPS)
def test_deep_gemm_scores_float8_keys_and_our_program_all_others(chip: Architecture) -> None:
    workers = runtime(chip).chip.num_sms
    for fp8, heads, num_workers, by_deep_gemm in (
        (True, 4, workers, True),
        (False, 4, workers, False),
        (True, 65, workers, False),
        (True, 4, 7, False),
    ):
        programs = RecordedPrograms()
        indexer = Indexer(runtime(chip, deep_gemm=True, programs=programs), "auto")
        one = case([[300, 301], [5, 6]], fp8=fp8, heads=heads)
        check_scores(one, one.scores(indexer, num_workers, ForwardMode.DRAFT_EXTEND))
        assert ("paged_mqa_kernel" in programs.names) is not by_deep_gemm
        assert ("paged_mqa_query_kernel" in programs.names) is fp8


@pytest.mark.parametrize("chip", CHIPS)
def test_both_ways_give_the_same_but_for_the_order_of_sums(chip: Architecture) -> None:
    one = case([[700], [3], [256]], fp8=True, heads=64, dim=128)
    ways = [Way(chip, deep_gemm) for deep_gemm in (False, True)]
    found = [one.scores(way.indexer(), way.num_workers) for way in ways]
    for scores in found:
        check_scores(one, scores)
    ours, theirs = (scores.double().numpy() for scores in found)
    seen = visible(one, 700)
    off = abs(ours[:, :700] - theirs[:, :700])[seen]
    bound = by_definition(one, query=quantised_query(one)).bound[:, :700][seen]
    assert (off <= 2 * bound).all()


@EVERY_WAY
def test_float8_costs_what_its_authors_allow(way: Way) -> None:
    """Of as many heads and numbers as their test has, over many rows: with fewer it may be more."""
    one = case([[300 + row] for row in range(24)], fp8=True, heads=64, dim=128)
    seen = visible(one, 323)
    found = one.scores(way.indexer(), way.num_workers)[:, :323].double().numpy()[seen]
    unquantised = by_definition(one, as_cached=False).values[:, :323][seen]
    assert 1e-4 < calc_diff(found, unquantised) < 1e-3


@pytest.mark.parametrize("num_workers", [1, 2, 131, 132, 148])
def test_no_score_depends_on_the_number_of_workers(num_workers: int) -> None:
    one = case([[700], [3], [256]])
    indexer = Indexer(runtime(Architecture.SM90), "triton")
    expected = one.scores(indexer, 5)
    assert torch.equal(one.scores(indexer, num_workers).nan_to_num(), expected.nan_to_num())


def test_columns_past_a_length_are_left_alone() -> None:
    """Poison there shows a caller who reads them; a program that wrote them would hide it."""
    one = case([[300], [0], [65]])
    found = one.scores(Indexer(runtime(Architecture.SM90), "triton"), 4)
    # A row without keys is planned as a row of one.
    planned = np.maximum(one.lens.numpy(), 1)
    written = np.arange(found.shape[1]) < planned
    assert (found.isnan().numpy() == ~written).all()


@pytest.mark.parametrize("fp8", [False, True])
@EVERY_WAY
def test_float32_models_are_scored_exactly(way: Way, fp8: bool) -> None:
    one = case([[70], [130]], fp8=fp8, dtype=torch.float32)
    found = one.scores(way.indexer(), way.num_workers)
    metadata = reference.paged_mqa_metadata(one.lens, BLOCK, 4, ForwardMode.DECODE)
    expected = reference.paged_mqa_logits(one.query, one.pages, one.weights, one.table, metadata)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("fp8", [False, True])
def test_rows_need_not_be_dense(fp8: bool) -> None:
    """Queries, weights and page tables are often slices."""
    one = case([[70], [130]], fp8=fp8)
    indexer = Indexer(runtime(Architecture.SM90), "triton")
    spread = replace(
        one,
        query=one.query.transpose(2, 3).contiguous().transpose(2, 3),
        weights=one.weights.repeat_interleave(2, dim=1)[:, ::2],
        table=torch.cat([one.table, one.table], dim=1)[:, : one.table.shape[1]],
    )
    assert torch.equal(spread.scores(indexer, 4).nan_to_num(), one.scores(indexer, 4).nan_to_num())


# ---- fused pages


def test_the_fused_view_is_the_memory_of_keys_and_scales() -> None:
    pages = case([[1]], fp8=True, dim=128).pages
    fused = fused_kv(pages)
    assert fused.shape == (7, BLOCK, 1, 132)
    assert fused.data_ptr() == pages.keys.data_ptr()
    assert pages.scales is not None
    assert torch.equal(fused.flatten(1), fuse(pages.keys, pages.scales))
    one_page = IndexKeyPages(keys=pages.keys[2:3], scales=pages.scales[2:3])
    assert torch.equal(fused_kv(one_page), fused[2:3])


def test_pages_that_are_not_fused_are_refused() -> None:
    pages = case([[1]], fp8=True).pages
    assert pages.scales is not None
    for wrong in (
        IndexKeyPages(keys=pages.keys),
        IndexKeyPages(keys=pages.keys.contiguous(), scales=pages.scales.contiguous()),
        IndexKeyPages(keys=pages.keys, scales=pages.scales.contiguous()),
        IndexKeyPages(keys=pages.keys[1:], scales=pages.scales[:-1]),
        IndexKeyPages(keys=dequantised(pages).bfloat16(), scales=pages.scales),
    ):
        with pytest.raises(ContractError):
            fused_kv(wrong)


def test_our_program_takes_keys_and_scales_wherever_they_lie() -> None:
    one = case([[70], [130]], fp8=True)
    assert one.pages.scales is not None
    apart = IndexKeyPages(keys=one.pages.keys.contiguous(), scales=one.pages.scales.contiguous())
    indexer = Indexer(runtime(Architecture.SM90), "triton")
    assert torch.equal(
        replace(one, pages=apart).scores(indexer, 4).nan_to_num(),
        one.scores(indexer, 4).nan_to_num(),
    )


# ---- plans that do not belong to their launch


@EVERY_WAY
@pytest.mark.parametrize("mode", ForwardMode)
def test_a_refresh_keeps_the_storage_that_a_captured_graph_reads(
    way: Way, mode: ForwardMode
) -> None:
    one = case([[700], [4], [300]], fp8=True)
    indexer = way.indexer()
    stale = one.plan(indexer, way.num_workers, mode)
    buffers = stale.buffers
    tensors = (buffers.context_lens, buffers.planned_lens, buffers.schedule)
    addresses = [tensor.data_ptr() for tensor in tensors if tensor is not None]
    other = replace(one, lens=torch.tensor([[3], [650], [0]], dtype=torch.int32))
    fresh = refresh_paged_mqa_metadata(stale, other.plan(indexer, way.num_workers, mode))
    assert fresh.buffers is buffers
    assert addresses == [tensor.data_ptr() for tensor in tensors if tensor is not None]
    assert buffers.planned_lens is not None
    assert buffers.planned_lens.tolist() == [[3], [650], [1]]
    check_scores(other, other.launch(indexer, fresh))
    with pytest.raises(StaleScheduleError, match="generation 0 launched on buffers of"):
        other.launch(indexer, stale)


@pytest.mark.parametrize("fp8", [False, True])
def test_recorded_launches_are_replayed_with_the_refreshed_plan(fp8: bool) -> None:
    """What a graph does: the launches of the capture again, on what the refresh left there."""
    programs = RecordedPrograms()
    indexer = Indexer(runtime(Architecture.SM90, programs=programs), "triton")
    longest = case([[700], [700], [700]], fp8=fp8)
    captured = longest.plan(indexer, 7)
    result = longest.launch(indexer, captured)
    for lens in ([[1], [300], [650]], [[700], [0], [256]], [[0], [0], [0]]):
        now = replace(longest, lens=torch.tensor(lens, dtype=torch.int32))
        captured = refresh_paged_mqa_metadata(captured, now.plan(indexer, 7))
        result.fill_(torch.nan)
        programs.replay()
        if any(map(any, lens)):
            check_scores(now, result)
        written = np.arange(result.shape[1]) < np.maximum(now.lens.numpy(), 1)
        assert (result.isnan().numpy() == ~written).all()


@pytest.mark.parametrize("chip", CHIPS)
def test_a_stale_plan_ends_in_an_error_of_the_emulator(chip: Architecture) -> None:
    """Only whoever goes around the owner can do this; on a chip it would not return."""
    way = Way(chip, deep_gemm=True)
    one = case([[5000]] * 9, fp8=True)
    metadata = one.plan(way.indexer(), way.num_workers)
    assert metadata.planned_lens is not None
    metadata.planned_lens.fill_(100)
    with pytest.raises(RuntimeError, match="would never end"):
        one.launch(way.indexer(), metadata)


@pytest.mark.parametrize("length", [1, 100, 4999, 6000])
def test_our_program_ends_whatever_the_lengths_have_become(length: int) -> None:
    """It writes no column but those of rows and lengths; its plan may leave some out."""
    one = case([[5000]] * 3)
    indexer = Indexer(runtime(Architecture.SM90), "triton")
    metadata = one.plan(indexer, 7)
    assert metadata.planned_lens is not None
    metadata.planned_lens.fill_(length)
    found = one.launch(indexer, metadata)
    assert found[:, length:].isnan().all()


def test_shapes_that_changed_since_the_plan_are_refused_at_once() -> None:
    programs = RecordedPrograms()
    way = Way(Architecture.SM90, deep_gemm=True)
    indexer = way.indexer(programs)
    one = case([[300], [5]], fp8=True)
    metadata = one.plan(indexer, way.num_workers)
    fewer = replace(one, query=one.query[:1])
    schedule = metadata.schedule
    assert schedule is not None and one.pages.scales is not None
    wrong = {
        "1 query rows, 2 page-table rows": fewer,
        "2 query rows, 1 page-table rows": replace(one, table=one.table[:1]),
        "1 weight rows": replace(one, weights=one.weights[:1]),
        "query is .*2, 2, 4, 32": replace(one, query=one.query.repeat(1, 2, 1, 1)),
        "weights is torch.float32 .2, 3.": replace(one, weights=one.weights[:, :3]),
        "weights is torch.bfloat16": replace(one, weights=one.weights.bfloat16()),
        "page_table is torch.int64": replace(one, table=one.table.long()),
        "page_table has strides": replace(one, table=one.table.mT.contiguous().mT),
        "a page table of 4 pages of 64 keys": replace(one, table=one.table[:, :4]),
        "key_pages.keys is .*32, 32": replace(
            one, pages=IndexKeyPages(keys=one.pages.keys[:, :32], scales=one.pages.scales)
        ),
        "key_pages.keys is torch.float8": replace(one, pages=IndexKeyPages(keys=one.pages.keys)),
        "key_pages.scales is torch.float64": replace(
            one, pages=IndexKeyPages(keys=one.pages.keys, scales=one.pages.scales.double())
        ),
    }
    for message, launch in wrong.items():
        with pytest.raises(ContractError, match=message):
            launch.launch(indexer, metadata)
    with pytest.raises(ContractError, match=r"schedule is torch.int32 .133, 2."):
        one.launch(indexer, replace(metadata, num_workers=way.num_workers + 1))
    with pytest.raises(ContractError, match="without a schedule"):
        one.launch(indexer, reference.paged_mqa_metadata(one.lens, BLOCK, 4, ForwardMode.PREFILL))
    with pytest.raises(ContractError, match="cannot refresh"):
        refresh_paged_mqa_metadata(metadata, case([[3]], fp8=True).plan(indexer, way.num_workers))
    assert not programs.launches


@pytest.mark.parametrize(
    ("lens", "message"),
    [
        (torch.ones(4, dtype=torch.int32), "context_lens is torch.int32 .4."),
        (torch.ones(4, 1), "context_lens is torch.float32"),
        (torch.ones(4, 1, dtype=torch.int64), "context_lens is torch.int64"),
        (torch.ones(2, 4, dtype=torch.int32).mT, "strides .1, 4."),
        (torch.ones(4, 0, dtype=torch.int32), "context_lens is torch.int32 .4, 0."),
        (torch.tensor([[3], [-1]], dtype=torch.int32), "a context length of -1"),
    ],
)
def test_lengths_that_kernels_would_misread_are_refused(lens: torch.Tensor, message: str) -> None:
    indexer = Indexer(runtime(Architecture.SM90), "triton")
    with pytest.raises(ContractError, match=message):
        indexer.metadata(lens, BLOCK, 4, ForwardMode.DECODE)
    with pytest.raises(ContractError, match="0 workers"):
        indexer.metadata(torch.ones(1, 1, dtype=torch.int32), BLOCK, 0, ForwardMode.DECODE)


def test_the_plan_owns_its_lengths() -> None:
    lens = torch.tensor([[3], [0]], dtype=torch.int32)
    indexer = Indexer(runtime(Architecture.SM90), "triton")
    metadata = indexer.metadata(lens, BLOCK, 4, ForwardMode.DECODE)
    lens.fill_(99)
    assert metadata.context_lens.tolist() == [[3], [0]]
    assert metadata.planned_lens is not None
    assert metadata.planned_lens.tolist() == [[3], [1]]
    assert metadata.max_context_len == 3


def test_deep_gemm_that_was_asked_for_says_why_it_cannot() -> None:
    indexer = Indexer(runtime(Architecture.SM90, deep_gemm=True), "deep_gemm")
    plain, many = case([[5]]), case([[5]], fp8=True, heads=65)
    for one, workers, message in (
        (plain, 132, "cached as torch.bfloat16"),
        (many, 132, "65 heads of 32 numbers, and it takes up to 64"),
        (plain, 7, "plans for 132 workers, not for 7"),
    ):
        with pytest.raises(ConfigError, match=message):
            one.scores(indexer, workers)
    with pytest.raises(ConfigError, match="pages of 16 keys"):
        indexer.metadata(plain.lens, 16, 132, ForwardMode.DECODE)
    with pytest.raises(ConfigError, match="20000 rows do not fit"):
        indexer.metadata(torch.ones(20_000, 1, dtype=torch.int32), BLOCK, 132, ForwardMode.PREFILL)
