"""The selection keeps best scores, shows no hidden key, and settles ties by the row's own width."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mortise.layers.index_selection import RowSpan, select_keys
from mortise.layers.paged_attention import BatchLayout
from mortise.spec.roles import ForwardMode


@dataclass(frozen=True)
class Rows:
    """Rows of scores; what a row does not see is NaN."""

    logits: torch.Tensor
    visible: torch.Tensor
    topk: int
    widths: list[int]

    def select(self) -> list[list[int]]:
        spans = [RowSpan(row, row + 1, width) for row, width in enumerate(self.widths)]
        chosen = select_keys(self.logits, self.visible, self.topk, spans)
        assert chosen.dtype == torch.int64
        assert chosen.shape == (len(self.visible), self.topk)
        return chosen.tolist()


# Few different scores, so that ties are everywhere.
scores = st.sampled_from([-2.0, -0.5, 0.0, 0.0, 0.0, 1.0, 3.0])


@st.composite
def rows_of_scores(draw: st.DrawFn) -> Rows:
    columns = draw(st.integers(1, 20))
    visible = draw(st.lists(st.integers(1, columns), min_size=1, max_size=6))
    logits = torch.full((len(visible), columns), torch.nan)
    for row, count in enumerate(visible):
        values = draw(st.lists(scores, min_size=count, max_size=count))
        logits[row, :count] = torch.tensor(values)
    return Rows(
        logits,
        torch.tensor(visible),
        draw(st.integers(1, 12)),
        [count + draw(st.integers(0, 10)) for count in visible],
    )


@given(rows_of_scores())
def test_a_row_keeps_its_best_visible_keys_and_pads_with_minus_one(rows: Rows) -> None:
    for row, (chosen, count) in enumerate(zip(rows.select(), rows.visible.tolist(), strict=True)):
        kept = [position for position in chosen if position != -1]
        assert len(set(kept)) == len(kept) == min(count, rows.topk)
        assert all(0 <= position < count for position in kept)
        values = sorted((float(rows.logits[row, position]) for position in kept), reverse=True)
        assert values == sorted(rows.logits[row, :count].tolist(), reverse=True)[: len(kept)]


@given(rows_of_scores())
def test_ties_are_those_of_torch_topk_over_the_width(rows: Rows) -> None:
    for row, (chosen, count) in enumerate(zip(rows.select(), rows.visible.tolist(), strict=True)):
        padded = torch.full((rows.widths[row],), -torch.inf)
        padded[:count] = rows.logits[row, :count]
        expected = padded.topk(min(rows.topk, len(padded))).indices.tolist()
        assert set(chosen) - {-1} == {position for position in expected if position < count}


@given(rows_of_scores(), st.integers(0, 30))
def test_a_row_depends_on_itself_alone(rows: Rows, extra_columns: int) -> None:
    """Neither on the other rows of the pass nor on how far the longest of them reaches."""
    together = rows.select()
    for row in range(len(together)):
        alone = Rows(
            torch.nn.functional.pad(
                rows.logits[row : row + 1], (0, extra_columns), value=torch.nan
            ),
            rows.visible[row : row + 1],
            rows.topk,
            rows.widths[row : row + 1],
        )
        assert alone.select() == together[row : row + 1]


@given(rows_of_scores())
def test_rows_of_one_width_may_be_told_as_one_span(rows: Rows) -> None:
    width = max(rows.widths)
    each = Rows(rows.logits, rows.visible, rows.topk, [width] * len(rows.visible)).select()
    span = [RowSpan(0, len(rows.visible), width)]
    assert select_keys(rows.logits, rows.visible, rows.topk, span).tolist() == each


def test_no_rows() -> None:
    empty = torch.empty(0, dtype=torch.int64)
    assert select_keys(torch.empty(0, 7), empty, 3, []).shape == (0, 3)


def layout(
    mode: ForwardMode, query: list[int], context: list[int], prompt: list[int] | None
) -> BatchLayout:
    pages = [[0] for _ in query]
    return BatchLayout.build(mode, query, context, pages, torch.device("cpu"), prompt)


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        (layout(ForwardMode.PREFILL, [3, 2], [3, 2], None), [(0, 3, 3), (3, 5, 2)]),
        (layout(ForwardMode.PREFILL, [3, 2], [3, 12], [9, 12]), [(0, 3, 9), (3, 5, 12)]),
        (layout(ForwardMode.DECODE, [1, 1], [4, 9], None), [(0, 1, 4), (1, 2, 9)]),
        (layout(ForwardMode.DECODE, [1], [4], [2]), [(0, 1, 4)]),
        (layout(ForwardMode.TARGET_VERIFY, [3], [9], [6]), [(0, 1, 7), (1, 2, 8), (2, 3, 9)]),
        # A preempted request comes back: its prompt, and tokens that it had generated.
        (layout(ForwardMode.PREFILL, [5], [5], [3]), [(0, 3, 3), (3, 4, 4), (4, 5, 5)]),
        (layout(ForwardMode.PREFILL, [0, 2], [6, 2], [6, 2]), [(0, 2, 2)]),
        (layout(ForwardMode.IDLE, [], [], None), []),
    ],
)
def test_the_width_is_the_prompt_or_what_a_generated_token_sees(
    batch: BatchLayout, expected: list[tuple[int, int, int]]
) -> None:
    assert list(batch.row_spans()) == expected
