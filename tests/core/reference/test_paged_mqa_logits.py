"""The indexer's scores over pages equal a loop over keys, whatever the page table looks like."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mortise.errors import ContractError
from mortise.reference.attention import paged_mqa_logits, paged_mqa_metadata
from mortise.spec.paged_mqa import IndexKeyPages
from mortise.spec.roles import ForwardMode

BLOCK, HEADS, DIM, PAGES = 4, 3, 8, 6


@dataclass(frozen=True)
class Launch:
    """Arguments of one call; every key that no row may see is NaN."""

    query: torch.Tensor
    pages: IndexKeyPages
    weights: torch.Tensor
    table: torch.Tensor
    lens: torch.Tensor

    def run(self, mode: ForwardMode = ForwardMode.DECODE) -> torch.Tensor:
        metadata = paged_mqa_metadata(self.lens, BLOCK, 5, mode)
        return paged_mqa_logits(self.query, self.pages, self.weights, self.table, metadata)


@st.composite
def launches(draw: st.DrawFn) -> Launch:
    next_n = draw(st.integers(1, 3))
    # Several rows may be of one request: they share a line of the page table, and so do prefixes.
    requests = draw(
        st.lists(
            st.lists(st.integers(0, PAGES - 1), min_size=3, max_size=3), min_size=1, max_size=4
        )
    )
    rows = draw(st.lists(st.sampled_from(requests), min_size=1, max_size=7))
    lens = draw(
        st.lists(
            st.lists(st.integers(0, 3 * BLOCK), min_size=next_n, max_size=next_n),
            min_size=len(rows),
            max_size=len(rows),
        )
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    keys = torch.randn(PAGES, BLOCK, DIM, generator=generator)
    scales = torch.rand(PAGES, BLOCK, generator=generator) if draw(st.booleans()) else None
    return Launch(
        query=torch.randn(len(rows), next_n, HEADS, DIM, generator=generator),
        pages=IndexKeyPages(keys=keys, scales=scales),
        weights=torch.randn(len(rows) * next_n, HEADS, generator=generator),
        table=torch.tensor(rows, dtype=torch.int32),
        lens=torch.tensor(lens, dtype=torch.int32),
    )


def naive(launch: Launch, row: int, token: int, position: int) -> float:
    page = int(launch.table[row, position // BLOCK])
    key = launch.pages.keys[page, position % BLOCK].double().numpy()
    score = sum(
        float(weight) * max(float(query.double().numpy() @ key), 0.0)
        for weight, query in zip(
            launch.weights[row * launch.lens.shape[1] + token],
            launch.query[row, token],
            strict=True,
        )
    )
    scales = launch.pages.scales
    return score if scales is None else score * float(scales[page, position % BLOCK])


@given(launches())
def test_visible_columns_are_the_definition(launch: Launch) -> None:
    got = launch.run()
    rows, next_n = launch.lens.shape
    assert got.dtype == torch.float32
    assert got.shape[0] == rows * next_n
    assert got.shape[1] >= int(launch.lens.max())
    for row in range(rows):
        for token in range(next_n):
            length = int(launch.lens[row, token])
            expected = [naive(launch, row, token, position) for position in range(length)]
            line = got[row * next_n + token, :length].double().numpy()
            np.testing.assert_allclose(line, expected, atol=1e-4)


@given(launches())
def test_what_no_row_sees_changes_nothing(launch: Launch) -> None:
    seen = torch.zeros(PAGES, BLOCK, dtype=torch.bool)
    for pages, lens in zip(launch.table.tolist(), launch.lens.tolist(), strict=True):
        for position in range(max(lens)):
            seen[pages[position // BLOCK], position % BLOCK] = True
    expected = launch.run()
    launch.pages.keys[~seen] = torch.nan
    got = launch.run()
    for row, length in enumerate(launch.lens.flatten().tolist()):
        torch.testing.assert_close(got[row, :length], expected[row, :length])


@given(launches())
def test_every_mode_computes_the_same(launch: Launch) -> None:
    expected = launch.run()
    for mode in ForwardMode:
        torch.testing.assert_close(launch.run(mode), expected, rtol=0, atol=0)


@given(launches())
def test_float8_keys_in_blocks_of_a_page_score_as_their_values(launch: Launch) -> None:
    """Keys and scales are strided views of one block a page, as the cache has them."""
    blocks = torch.zeros(PAGES, BLOCK * (DIM + 4), dtype=torch.uint8)
    values = blocks[:, : BLOCK * DIM].unflatten(1, (BLOCK, DIM)).view(torch.float8_e4m3fn)
    scales = blocks[:, BLOCK * DIM :].view(torch.float32)
    values.copy_(launch.pages.keys)
    scales.copy_(torch.rand(PAGES, BLOCK, generator=torch.Generator().manual_seed(0)))
    got = replace(launch, pages=IndexKeyPages(keys=values, scales=scales)).run()
    widened = IndexKeyPages(keys=values.float() * scales.unsqueeze(-1))
    expected = replace(launch, pages=widened).run()
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def launch_of(rows: int) -> Launch:
    return Launch(
        query=torch.ones(rows, 1, HEADS, DIM),
        pages=IndexKeyPages(keys=torch.ones(PAGES, BLOCK, DIM)),
        weights=torch.ones(rows, HEADS),
        table=torch.zeros(rows, 2, dtype=torch.int32),
        lens=torch.full((rows, 1), 5, dtype=torch.int32),
    )


def test_no_rows() -> None:
    assert launch_of(0).run().shape[0] == 0


def test_a_launch_whose_rows_disagree_is_refused() -> None:
    launch, other = launch_of(3), launch_of(2)
    metadata = paged_mqa_metadata(launch.lens, BLOCK, 2, ForwardMode.DECODE)
    for query, weights, table in (
        (other.query, launch.weights, launch.table),
        (launch.query, other.weights, launch.table),
        (launch.query, launch.weights, other.table),
    ):
        with pytest.raises(ContractError, match="indexer launch with"):
            paged_mqa_logits(query, launch.pages, weights, table, metadata)


def test_bfloat16_keys_are_scored_in_float32() -> None:
    """A sum of many heads in bfloat16 would lose the small ones."""
    heads = 300
    query = torch.ones(1, 1, heads, 1, dtype=torch.bfloat16)
    pages = IndexKeyPages(keys=torch.ones(1, BLOCK, 1, dtype=torch.bfloat16))
    metadata = paged_mqa_metadata(
        torch.tensor([[1]], dtype=torch.int32), BLOCK, 1, ForwardMode.DECODE
    )
    table = torch.zeros(1, 1, dtype=torch.int32)
    got = paged_mqa_logits(query, pages, torch.full((1, heads), 1.001), table, metadata)
    assert float(got[0, 0]) == pytest.approx(300.3, abs=1e-2)
