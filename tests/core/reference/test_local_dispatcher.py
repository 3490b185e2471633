"""The exchange within one process loses no row, invents none, and weights each by its routing."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.fixtures.dispatch_formats import FORMATS, as_bytes, hidden_dtype

from mortise.errors import CapacityError, ContractError
from mortise.formats.rows import quantise_rows
from mortise.reference.dispatch import LocalDispatcher, create_token_dispatcher
from mortise.spec.dispatch import (
    DispatchDtype,
    DispatchedTokens,
    DispatchFormat,
    DispatchMode,
    GroupListKind,
    Routing,
    RowLayout,
    TokenDispatcherRequest,
)
from mortise.spec.hooks import NOT_SUPPORTED
from mortise.spec.roles import ModelRole

if TYPE_CHECKING:
    from collections.abc import Callable

HIDDEN = 5
FORMAT = DispatchFormat(dtype=DispatchDtype.FP32)


@dataclass(frozen=True)
class Case:
    """Tokens and where they go."""

    num_experts: int
    hidden: torch.Tensor
    routing: Routing

    def dispatch(self) -> tuple[DispatchedTokens, object]:
        return LocalDispatcher(self.num_experts).dispatch(self.hidden, self.routing, FORMAT)

    def expected(self, scale_of: torch.Tensor) -> torch.Tensor:
        """The weighted sum over experts that multiply by a number each, token by token."""
        out = torch.zeros(self.hidden.shape, dtype=torch.float64)
        for token, (ids, weights) in enumerate(
            zip(self.routing.topk_ids.tolist(), self.routing.topk_weights.tolist(), strict=True)
        ):
            for expert, weight in zip(ids, weights, strict=True):
                if expert >= 0:
                    out[token] += weight * float(scale_of[expert]) * self.hidden[token].double()
        return out


def case(num_experts: int, ids: list[list[int]], num_choices: int, seed: int = 0) -> Case:
    generator = torch.Generator().manual_seed(seed)
    topk_ids = torch.tensor(ids, dtype=torch.int64).view(len(ids), num_choices)
    return Case(
        num_experts=num_experts,
        hidden=torch.randn(len(ids), HIDDEN, generator=generator),
        routing=Routing(
            topk_ids=topk_ids, topk_weights=torch.rand(topk_ids.shape, generator=generator)
        ),
    )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    num_experts = draw(st.integers(1, 6))
    num_choices = draw(st.integers(1, num_experts))
    one_token = st.lists(
        st.integers(-1, num_experts - 1), min_size=num_choices, max_size=num_choices
    )
    ids = draw(st.lists(one_token, max_size=9))
    return case(num_experts, ids, num_choices, draw(st.integers(0, 2**16)))


def applied(tokens: DispatchedTokens, scale_of: torch.Tensor) -> torch.Tensor:
    """Experts that multiply by a number each; rows of no group come out as NaN."""
    assert tokens.group_counts is not None
    out = torch.full_like(tokens.rows, torch.nan)
    start = 0
    for expert, count in enumerate(tokens.group_counts):
        out[start : start + count] = tokens.rows[start : start + count] * scale_of[expert]
        start += count
    return out


@given(cases())
def test_combining_what_experts_made_is_the_weighted_sum(case: Case) -> None:
    scale_of = torch.arange(1.0, case.num_experts + 1)
    tokens, handle = case.dispatch()
    combined = LocalDispatcher(case.num_experts).combine(applied(tokens, scale_of), handle)
    assert combined.dtype == torch.float32
    torch.testing.assert_close(combined.double(), case.expected(scale_of), atol=1e-5, rtol=1e-5)


@given(cases())
def test_rows_are_grouped_by_expert_in_the_order_of_the_tokens(case: Case) -> None:
    tokens, _ = case.dispatch()
    expected = [
        case.hidden[token].tolist()
        for expert in range(case.num_experts)
        for token, ids in enumerate(case.routing.topk_ids.tolist())
        for choice in ids
        if choice == expert
    ]
    assert tokens.rows.tolist() == expected
    assert tokens.group_list_kind is GroupListKind.COUNTS
    assert tokens.group_list.dtype == torch.int64
    assert tuple(tokens.group_list.tolist()) == tokens.group_counts
    assert len(tokens.group_counts) == case.num_experts
    assert tokens.scales is None
    assert tokens.format is FORMAT


@given(cases(), st.randoms(use_true_random=False))
def test_the_order_of_the_tokens_does_not_matter(case: Case, random: object) -> None:
    order = list(range(len(case.hidden)))
    random.shuffle(order)  # type: ignore[attr-defined]
    shuffled = Case(
        case.num_experts,
        case.hidden[order],
        Routing(
            topk_ids=case.routing.topk_ids[order], topk_weights=case.routing.topk_weights[order]
        ),
    )
    scale_of = torch.arange(1.0, case.num_experts + 1)
    outputs = []
    for one in (case, shuffled):
        tokens, handle = one.dispatch()
        outputs.append(LocalDispatcher(one.num_experts).combine(applied(tokens, scale_of), handle))
    assert torch.equal(outputs[0][order], outputs[1])


@given(cases())
def test_rows_past_the_last_group_are_not_read(case: Case) -> None:
    tokens, handle = case.dispatch()
    dispatcher = LocalDispatcher(case.num_experts)
    padded = torch.cat([tokens.rows, torch.full((3, HIDDEN), torch.nan)])
    torch.testing.assert_close(
        dispatcher.combine(padded, handle), dispatcher.combine(tokens.rows, handle)
    )


@pytest.mark.parametrize(
    "one",
    [
        case(4, [], 2),
        case(4, [[-1, -1], [-1, -1]], 2),
        case(4, [[2, 2]], 2),
        case(4, [[3]] * 7, 1),
        case(1, [[0]], 1),
    ],
    ids=["no token", "no expert", "one expert twice", "one expert holds all", "one of everything"],
)
def test_edges(one: Case) -> None:
    scale_of = torch.arange(1.0, one.num_experts + 1)
    tokens, handle = one.dispatch()
    combined = LocalDispatcher(one.num_experts).combine(applied(tokens, scale_of), handle)
    assert combined.shape == one.hidden.shape
    torch.testing.assert_close(combined.double(), one.expected(scale_of), atol=1e-5, rtol=1e-5)


def test_the_sum_over_choices_is_taken_in_float32() -> None:
    """256 + 1 is 256 in bfloat16: summed there, the second choice would be lost."""
    routing = Routing(
        topk_ids=torch.tensor([[0, 1, 2]]), topk_weights=torch.tensor([[256.0, 1.0, -256.0]])
    )
    hidden = torch.ones(1, HIDDEN, dtype=torch.bfloat16)
    dispatcher = LocalDispatcher(3)
    tokens, handle = dispatcher.dispatch(hidden, routing, DispatchFormat(dtype=DispatchDtype.BF16))
    combined = dispatcher.combine(tokens.rows, handle)
    assert combined.dtype == torch.bfloat16
    assert combined.tolist() == [[1.0] * HIDDEN]


def test_two_calls_may_be_under_way_at_once() -> None:
    """State lives in the handle."""
    dispatcher = LocalDispatcher(3)
    first, second = case(3, [[0, 1], [2, 0]], 2), case(3, [[1, 1]], 2, seed=1)
    sent = [dispatcher.dispatch(one.hidden, one.routing, FORMAT) for one in (first, second)]
    for one, (tokens, handle) in reversed(list(zip((first, second), sent, strict=True))):
        combined = dispatcher.combine(tokens.rows, handle)
        torch.testing.assert_close(combined.double(), one.expected(torch.ones(3)))


IDS = [[0, 3], [3, 3], [-1, 0], [-1, -1], [3, 1], [0, 2]]
TOKENS_OF_EXPERT = [[0, 2, 5], [4], [5], [0, 1, 4]]
"""With a token once where it names an expert twice."""


def sent(row_format: DispatchFormat) -> tuple[torch.Tensor, Routing]:
    """Six tokens for four experts, in a hidden size that fills no group of 128 columns."""
    generator = torch.Generator().manual_seed(11)
    hidden = torch.randn(len(IDS), 208, generator=generator).to(hidden_dtype(row_format))
    weights = torch.rand(len(IDS), 2, generator=generator)
    return hidden, Routing(topk_ids=torch.tensor(IDS), topk_weights=weights)


@pytest.mark.parametrize("mode", DispatchMode)
@pytest.mark.parametrize("name", FORMATS)
def test_rows_are_quantised_and_keep_their_scales(name: str, mode: DispatchMode) -> None:
    row_format = replace(FORMATS[name], row_layout=RowLayout.MASKED, mode=mode)
    hidden, routing = sent(row_format)
    dispatcher = LocalDispatcher(4, max_tokens_per_rank=9, poison=True)
    tokens, _ = dispatcher.dispatch(hidden, routing, row_format)
    expected_rows, expected_scales = quantise_rows(hidden, row_format)
    assert tokens.rows.shape[:2] == (4, 9 if mode is DispatchMode.LOW_LATENCY else len(IDS))
    assert (tokens.group_counts is None) is (mode is DispatchMode.LOW_LATENCY)
    assert (tokens.scales is None) is (expected_scales is None)
    for expert, wanted in enumerate(TOKENS_OF_EXPERT):
        count = int(tokens.group_list[expert])
        assert count == len(wanted)
        rows = tokens.rows[expert, :count]
        assert rows.dtype == expected_rows.dtype
        assert torch.equal(as_bytes(rows), as_bytes(expected_rows)[wanted])
        assert (as_bytes(tokens.rows[expert, count:]) == 0xFF).all()
        if tokens.scales is not None and expected_scales is not None:
            assert tokens.scales.dtype == expected_scales.dtype
            scales = as_bytes(tokens.scales[expert, :count].flatten())
            assert torch.equal(scales, as_bytes(expected_scales[wanted].flatten()))


@pytest.mark.parametrize("mode", DispatchMode)
@pytest.mark.parametrize("layout", RowLayout)
def test_every_layout_comes_home_the_same(layout: RowLayout, mode: DispatchMode) -> None:
    row_format = replace(FORMATS["bf16"], row_layout=layout, mode=mode, alignment=4)
    hidden, routing = sent(row_format)
    plain = LocalDispatcher(4)
    tokens, handle = plain.dispatch(hidden, routing, FORMATS["bf16"])
    expected = plain.combine(tokens.rows, handle)
    dispatcher = LocalDispatcher(4, poison=True)
    tokens, handle = dispatcher.dispatch(hidden, routing, row_format)
    assert torch.equal(dispatcher.combine(tokens.rows, handle), expected)


def test_padding_is_not_counted() -> None:
    row_format = replace(FORMATS["bf16"], row_layout=RowLayout.GROUPED_ALIGNED, alignment=4)
    tokens, _ = LocalDispatcher(4, poison=True).dispatch(*sent(row_format), row_format)
    assert tokens.group_counts == (3, 1, 1, 4)
    assert len(tokens.rows) == 16
    padding = [3, 5, 6, 7, 9, 10, 11]
    assert tokens.rows.isnan().any(dim=1).nonzero().flatten().tolist() == padding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hidden_states_of_another_dtype_than_the_format_are_refused(dtype: torch.dtype) -> None:
    name = "bf16" if dtype == torch.float32 else "fp32"
    hidden, routing = sent(FORMATS[name])
    with pytest.raises(ContractError, match=rf"layer mlp\.7: {dtype} rows .* sent as {name}"):
        LocalDispatcher(4, layer="mlp.7").dispatch(hidden.to(dtype), routing, FORMATS[name])


def test_more_tokens_than_the_capacity_are_refused() -> None:
    row_format = replace(FORMATS["bf16"], mode=DispatchMode.LOW_LATENCY)
    with pytest.raises(CapacityError) as caught:
        LocalDispatcher(4, layer="mlp.7", max_tokens_per_rank=5).dispatch(
            *sent(row_format), row_format
        )
    assert caught.value.what == "layer mlp.7: 6 tokens in a low-latency exchange"
    assert caught.value.expected == "at most 5, which is dispatch.max_tokens_per_rank"


@pytest.mark.parametrize(
    "wrong",
    [
        lambda rows: rows[:-1],
        lambda rows: rows[:, :-1],
        lambda rows: rows.to(torch.int8),
        lambda rows: rows[0],
    ],
    ids=["a row too few", "a column too few", "quantised", "one row"],
)
def test_what_is_not_a_row_for_each_is_refused(wrong: Callable[..., torch.Tensor]) -> None:
    dispatcher = LocalDispatcher(4, layer="mlp.7")
    tokens, handle = dispatcher.dispatch(*sent(FORMATS["fp32"]), FORMATS["fp32"])
    with pytest.raises(ContractError, match=r"layer mlp\.7: the experts made"):
        dispatcher.combine(wrong(tokens.rows), handle)


def test_the_weight_of_no_expert_is_not_looked_at() -> None:
    hidden, routing = sent(FORMATS["fp32"])
    weights = routing.topk_weights.masked_fill(routing.topk_ids < 0, torch.nan)
    dispatcher = LocalDispatcher(4)
    tokens, handle = dispatcher.dispatch(
        hidden, Routing(topk_ids=routing.topk_ids, topk_weights=weights), FORMATS["fp32"]
    )
    assert dispatcher.combine(tokens.rows, handle).isfinite().all()


def test_several_processes_are_somebody_elses_work() -> None:
    def request(world_size: int) -> TokenDispatcherRequest:
        return TokenDispatcherRequest(
            role=ModelRole.MAIN,
            layer="model.layers.1.mlp",
            num_experts=4,
            num_experts_per_tok=2,
            hidden_size=HIDDEN,
            world_size=world_size,
        )

    assert create_token_dispatcher(request(2)) is NOT_SUPPORTED
    assert isinstance(create_token_dispatcher(request(1)), LocalDispatcher)
