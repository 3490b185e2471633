"""A group of one rank is the exchange within one process, in every format and layout."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.fixtures.dispatch_formats import FORMATS, as_bytes, hidden_dtype

from mortise.errors import CapacityError, ConfigError, ContractError
from mortise.parallel.group import ExpertParallelGroup
from mortise.parallel.portable import create_portable_dispatcher
from mortise.reference.dispatch import LocalDispatcher
from mortise.spec.dispatch import (
    DispatchFormat,
    DispatchMode,
    Routing,
    RowLayout,
    TokenDispatcher,
    TokenDispatcherRequest,
)
from mortise.spec.roles import ModelRole

HIDDEN = 144
CAPACITY = 8
REQUEST = TokenDispatcherRequest(
    role=ModelRole.MAIN,
    layer="model.layers.7.mlp",
    num_experts=5,
    num_experts_per_tok=3,
    hidden_size=HIDDEN,
    max_tokens_per_rank=CAPACITY,
)
LAYOUTS = [
    (DispatchMode.NORMAL, RowLayout.GROUPED),
    (DispatchMode.NORMAL, RowLayout.GROUPED_ALIGNED),
    (DispatchMode.LOW_LATENCY, RowLayout.GROUPED),
    (DispatchMode.LOW_LATENCY, RowLayout.GROUPED_ALIGNED),
    (DispatchMode.LOW_LATENCY, RowLayout.MASKED),
]
TOKEN = st.lists(st.integers(-1, 4), min_size=3, max_size=3)


def portable(mode: DispatchMode, *, two_stage: bool = False) -> TokenDispatcher:
    """With two stages, poison must be there also where it is not asked for."""
    request = replace(REQUEST, mode=mode, two_stage=two_stage)
    return create_portable_dispatcher(request, ExpertParallelGroup(), poison=not two_stage)


def inputs(row_format: DispatchFormat, ids: list[list[int]]) -> tuple[torch.Tensor, Routing]:
    generator = torch.Generator().manual_seed(len(ids))
    hidden = torch.randn(len(ids), HIDDEN, generator=generator).to(hidden_dtype(row_format))
    topk_ids = torch.tensor(ids, dtype=torch.int64).view(len(ids), 3)
    weights = torch.rand(len(ids), 3, generator=generator)
    return hidden, Routing(topk_ids=topk_ids, topk_weights=weights)


@pytest.mark.parametrize(("mode", "layout"), LAYOUTS)
@given(ids=st.lists(TOKEN, max_size=CAPACITY), name=st.sampled_from(list(FORMATS)))
@settings(max_examples=30)
def test_the_same_bytes_arrive_and_come_home(
    mode: DispatchMode, layout: RowLayout, ids: list[list[int]], name: str
) -> None:
    """Undefined rows too: both dispatchers poison them."""
    row_format = replace(FORMATS[name], mode=mode, row_layout=layout, alignment=4)
    hidden, routing = inputs(row_format, ids)
    local = LocalDispatcher(5, max_tokens_per_rank=CAPACITY, poison=True)
    expected, expected_handle = local.dispatch(hidden, routing, row_format)
    dispatcher = portable(mode)
    tokens, handle = dispatcher.dispatch(hidden, routing, row_format)
    assert tokens.rows.dtype == expected.rows.dtype
    assert torch.equal(as_bytes(tokens.rows), as_bytes(expected.rows))
    assert (tokens.scales is None) is (expected.scales is None)
    if tokens.scales is not None and expected.scales is not None:
        assert tokens.scales.dtype == expected.scales.dtype
        assert torch.equal(as_bytes(tokens.scales), as_bytes(expected.scales))
    assert torch.equal(tokens.group_list, expected.group_list)
    assert tokens.group_list_kind is expected.group_list_kind
    assert tokens.group_counts == expected.group_counts
    assert tokens.receive is None
    made = torch.randn(*tokens.rows.shape[:-1], HIDDEN)
    assert torch.equal(dispatcher.combine(made, handle), local.combine(made, expected_handle))


@pytest.mark.parametrize("layout", RowLayout)
def test_nothing_can_be_read_before_it_was_received(layout: RowLayout) -> None:
    row_format = replace(
        FORMATS["int8"], mode=DispatchMode.LOW_LATENCY, row_layout=layout, alignment=4
    )
    hidden, routing = inputs(row_format, [[0, 3, -1], [4, 1, 0]])
    dispatcher = portable(DispatchMode.LOW_LATENCY, two_stage=True)
    tokens, handle = dispatcher.dispatch(hidden, routing, row_format)
    assert tokens.receive is not None
    assert tokens.scales is not None
    for undefined in (tokens.rows, tokens.scales, tokens.group_list):
        assert (as_bytes(undefined) == 0xFF).all()
    made = torch.ones(*tokens.rows.shape[:-1], HIDDEN)
    with pytest.raises(ContractError, match=r"layers\.7\.mlp: rows are combined that were not"):
        dispatcher.combine(made, handle)
    tokens.receive()
    at_once, _ = portable(DispatchMode.LOW_LATENCY).dispatch(hidden, routing, row_format)
    assert torch.equal(tokens.rows, at_once.rows)
    assert tokens.group_list.tolist() == [2, 1, 0, 1, 1]
    tokens.receive()
    assert torch.equal(tokens.rows, at_once.rows)
    weight_sums = routing.topk_weights.masked_fill(routing.topk_ids < 0, 0).sum(1, keepdim=True)
    combined = dispatcher.combine(made, handle)
    torch.testing.assert_close(combined, weight_sums.expand_as(combined))


def test_any_number_of_dispatches_may_be_under_way() -> None:
    row_format = replace(FORMATS["fp32"], mode=DispatchMode.LOW_LATENCY)
    dispatcher = portable(DispatchMode.LOW_LATENCY, two_stage=True)
    sent = [
        dispatcher.dispatch(*inputs(row_format, [[0, 1, 2]] * n), row_format) for n in (1, 4, 8)
    ]
    for count, (tokens, handle) in zip((1, 4, 8), sent, strict=True):
        assert tokens.receive is not None
        tokens.receive()
        hidden, routing = inputs(row_format, [[0, 1, 2]] * count)
        expected = hidden * routing.topk_weights.sum(1, keepdim=True)
        torch.testing.assert_close(dispatcher.combine(tokens.rows, handle), expected)


def test_more_tokens_than_the_capacity_are_refused() -> None:
    row_format = replace(FORMATS["fp32"], mode=DispatchMode.LOW_LATENCY)
    with pytest.raises(CapacityError) as caught:
        portable(DispatchMode.LOW_LATENCY).dispatch(
            *inputs(row_format, [[0, 1, 2]] * 9), row_format
        )
    assert caught.value.what == "layer model.layers.7.mlp: 9 tokens in a low-latency exchange"
    assert caught.value.expected == "at most 8, which is dispatch.max_tokens_per_rank"


@pytest.mark.parametrize(
    ("mode", "change", "what"),
    [
        (
            DispatchMode.NORMAL,
            {"mode": DispatchMode.LOW_LATENCY},
            "a low_latency format of grouped",
        ),
        (DispatchMode.NORMAL, {"row_layout": RowLayout.MASKED}, "a normal format of masked rows"),
        (DispatchMode.LOW_LATENCY, {"mode": DispatchMode.NORMAL}, "a normal format in the low-lat"),
    ],
)
def test_a_format_of_another_exchange_is_refused(
    mode: DispatchMode, change: dict[str, object], what: str
) -> None:
    row_format = replace(FORMATS["fp32"], **change)  # type: ignore[arg-type]
    with pytest.raises(ContractError, match=rf"layer model\.layers\.7\.mlp: {what}"):
        portable(mode).dispatch(*inputs(row_format, [[0, 1, 2]]), row_format)


@pytest.mark.parametrize("mode", DispatchMode)
def test_hidden_states_of_another_dtype_than_the_format_are_refused(mode: DispatchMode) -> None:
    hidden, routing = inputs(FORMATS["fp32"], [[0, 1, 2]])
    row_format = replace(FORMATS["bf16"], mode=mode)
    with pytest.raises(ContractError, match=r"layers\.7\.mlp: torch\.float32 .* sent as bf16"):
        portable(mode).dispatch(hidden, routing, row_format)


@pytest.mark.parametrize("mode", DispatchMode)
def test_what_is_not_a_row_for_each_is_refused(mode: DispatchMode) -> None:
    row_format = replace(FORMATS["fp32"], mode=mode)
    dispatcher = portable(mode)
    tokens, handle = dispatcher.dispatch(*inputs(row_format, [[0, 1, 2]]), row_format)
    for wrong in (tokens.rows[:-1], tokens.rows[:, :-1], tokens.rows.to(torch.int8)):
        with pytest.raises(ContractError, match=r"layers\.7\.mlp: the experts made"):
            dispatcher.combine(wrong, handle)


def test_a_low_latency_exchange_needs_a_size() -> None:
    request = replace(REQUEST, mode=DispatchMode.LOW_LATENCY, max_tokens_per_rank=0)
    with pytest.raises(ConfigError, match=r"layers\.7\.mlp: a low-latency exchange of 0 tokens"):
        create_portable_dispatcher(request, ExpertParallelGroup())


def test_experts_are_shared_in_equal_parts() -> None:
    group = ExpertParallelGroup(rank=2, world_size=4)
    assert group.share(8) == range(4, 6)
    with pytest.raises(ConfigError, match="9 experts cannot be shared evenly among 4 processes"):
        group.share(9)
