"""The indexer's scores behind the hooks pick what the chip's own operator picks."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mortise.errors import ContractError, StaleScheduleError
from mortise.plugin import (
    ForwardMode,
    IndexKeyPages,
    PagedMQAMetadata,
    refresh_paged_mqa_metadata,
)
from mortise.reference import attention as reference
from mortise_npu_ascend import attention
from mortise_npu_ascend.emulator import EmulatedNpu, Generation, install

HEADS, WIDTH, BLOCK, PAGES, COLUMNS = 8, 128, 64, 5, 3


@dataclass(frozen=True)
class Launch:
    """One pass: rows of several requests, or several rows of one."""

    query: torch.Tensor
    pages: IndexKeyPages
    weights: torch.Tensor
    table: torch.Tensor
    lens: torch.Tensor

    def metadata(self, mode: ForwardMode = ForwardMode.DECODE) -> PagedMQAMetadata:
        return attention.paged_mqa_metadata(self.lens, BLOCK, 24, mode)

    def scores(self, mode: ForwardMode = ForwardMode.DECODE) -> torch.Tensor:
        return attention.paged_mqa_logits(
            self.query, self.pages, self.weights, self.table, self.metadata(mode)
        )


def launch(
    tables: list[list[int]], lens: list[int], seed: int = 0, dtype: torch.dtype = torch.bfloat16
) -> Launch:
    generator = torch.Generator().manual_seed(seed)
    rows = len(tables)
    return Launch(
        query=torch.randn(rows, 1, HEADS, WIDTH, generator=generator).to(dtype),
        pages=IndexKeyPages(keys=torch.randn(PAGES, BLOCK, WIDTH, generator=generator).to(dtype)),
        weights=torch.randn(rows, HEADS, generator=generator),
        table=torch.tensor(tables, dtype=torch.int32).view(rows, COLUMNS),
        lens=torch.tensor(lens, dtype=torch.int32).view(rows, 1),
    )


def by_the_operator(one: Launch, npu: EmulatedNpu, count: int) -> torch.Tensor:
    """What ``npu_lightning_indexer`` picks ``[R, count]``, a sequence for each row."""
    weights = one.weights
    if npu.chip.generation is Generation.A5:
        weights = weights.to(one.query.dtype)
    indices, _ = npu.npu_lightning_indexer(
        one.query,
        one.pages.keys.unsqueeze(2),
        weights.unsqueeze(1),
        actual_seq_lengths_key=one.lens.flatten(),
        block_table=one.table,
        layout_key="PA_BSND",
        sparse_count=count,
        sparse_mode=0,
    )
    return indices.flatten(0, 2)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(0, PAGES - 1), min_size=COLUMNS, max_size=COLUMNS),
            st.integers(1, COLUMNS * BLOCK),
        ),
        min_size=1,
        max_size=4,
    ),
    st.integers(1, 70),
    st.sampled_from(Generation),
    st.integers(0, 1000),
)
def test_the_operator_picks_the_keys_of_the_highest_scores(
    rows: list[tuple[list[int], int]], count: int, generation: Generation, seed: int
) -> None:
    """As sets, and up to keys whose scores are one bfloat16: those the operator may swap."""
    one = launch([table for table, _ in rows], [length for _, length in rows], seed)
    if generation is Generation.A5:  # its operator takes no float32 weights
        one = replace(one, weights=one.weights.bfloat16().float())
    found = by_the_operator(one, install(generation), count)
    for row, scores in enumerate(one.scores()):
        length = int(one.lens[row])
        seen = scores[:length].bfloat16().float()
        ours = seen.topk(min(count, length)).values
        theirs = found[row][found[row] >= 0]
        assert len(theirs.unique()) == min(count, length)
        torch.testing.assert_close(
            seen[theirs.long()].sort(descending=True).values, ours, rtol=2**-7, atol=0.0
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("tables", "lens"),
    [
        ([[0, 1, 2]] * 3, [1, 64, 192]),
        ([[0, 1, 2], [3, 4, 0], [1, 1, 1]], [130, 3, 65]),
        ([[0, 1, 2], [0, 1, 2], [3, 4, 0], [0, 1, 2]], [10, 11, 100, 12]),
        ([[2, 2, 2]], [5]),
    ],
)
def test_scores_are_those_of_the_reference(
    tables: list[list[int]], lens: list[int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = launch(tables, lens, 7, dtype)
    metadata = reference.paged_mqa_metadata(one.lens, BLOCK, 4, ForwardMode.DECODE)
    expected = reference.paged_mqa_logits(one.query, one.pages, one.weights, one.table, metadata)
    torch.testing.assert_close(one.scores(), expected, rtol=1e-5, atol=1e-4)
    # However few rows fit in memory at a time.
    monkeypatch.setattr(attention, "MOST_NUMBERS", 1)
    torch.testing.assert_close(one.scores(), expected, rtol=1e-5, atol=1e-4)


def test_scales_of_keys_and_several_tokens_of_a_row() -> None:
    one = launch([[0, 1, 2], [3, 0, 1]], [70, 5], 3)
    two_tokens = Launch(
        query=one.query.repeat(1, 2, 1, 1),
        pages=IndexKeyPages(keys=one.pages.keys, scales=torch.rand(PAGES, BLOCK) + 0.5),
        weights=one.weights.repeat_interleave(2, dim=0),
        table=one.table,
        lens=one.lens.repeat(1, 2),
    )
    metadata = reference.paged_mqa_metadata(two_tokens.lens, BLOCK, 4, ForwardMode.TARGET_VERIFY)
    expected = reference.paged_mqa_logits(
        two_tokens.query, two_tokens.pages, two_tokens.weights, two_tokens.table, metadata
    )
    found = two_tokens.scores(ForwardMode.TARGET_VERIFY)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("mode", ForwardMode)
def test_no_row_and_no_key(mode: ForwardMode) -> None:
    none = launch([], [])
    assert none.scores(mode).shape == (0, 0)
    blank = launch([[0, 1, 2]], [0])
    assert blank.scores(mode).shape == (1, 0)


def test_the_record_owns_the_lengths_and_clamps_those_that_are_negative() -> None:
    lens = torch.tensor([[3], [-1]], dtype=torch.int32)
    metadata = attention.paged_mqa_metadata(lens, BLOCK, 24, ForwardMode.DECODE)
    lens.fill_(99)
    assert metadata.context_lens.flatten().tolist() == [3, 0]
    assert (metadata.max_context_len, metadata.schedule) == (3, None)
    assert metadata.context_lens.dtype is torch.int32


def test_a_plan_that_was_refreshed_is_launched_in_its_new_form_alone() -> None:
    one = launch([[0, 1, 2]], [10])
    stale = one.metadata()
    longer = replace(one, lens=one.lens + 100)
    fresh = refresh_paged_mqa_metadata(stale, longer.metadata())
    assert fresh.buffers is stale.buffers
    arguments = (one.query, one.pages, one.weights, one.table)
    with pytest.raises(StaleScheduleError):
        attention.paged_mqa_logits(*arguments, stale)
    assert torch.equal(attention.paged_mqa_logits(*arguments, fresh), longer.scores())


def test_rows_that_disagree_in_number_are_refused() -> None:
    one, two = launch([[0, 1, 2]], [10]), launch([[0, 1, 2]] * 2, [10, 11])
    with pytest.raises(ContractError, match="2 query rows, 1 page-table rows"):
        attention.paged_mqa_logits(two.query, one.pages, one.weights, one.table, one.metadata())
