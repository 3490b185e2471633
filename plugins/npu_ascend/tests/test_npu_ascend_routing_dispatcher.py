"""One process's rows through the chip's routing operators: what the portable exchange makes too."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mortise.errors import CapacityError, ContractError
from mortise.formats.rows import dequantise_rows
from mortise.parallel.group import ExpertParallelGroup
from mortise.parallel.portable import create_portable_dispatcher
from mortise.plugin import (
    NOT_SUPPORTED,
    DispatchDtype,
    DispatchedTokens,
    DispatchFormat,
    DispatchMode,
    GroupListKind,
    ModelRole,
    Routing,
    RoutingWeightSide,
    RowLayout,
    ScaleFormat,
    ScaleLayout,
    TokenDispatcherRequest,
)
from mortise_npu_ascend import vendor
from mortise_npu_ascend.emulator import Generation
from mortise_npu_ascend.environment import VendorEnvironment
from mortise_npu_ascend.exchanges import Exchanges
from mortise_npu_ascend.options import Options
from mortise_npu_ascend.token_dispatcher import RoutingDispatcher

EXPERTS, CHOICES, HIDDEN = 6, 3, 32

FORMATS = {
    "fp32": DispatchFormat(dtype=DispatchDtype.FP32),
    "bf16": DispatchFormat(dtype=DispatchDtype.BF16),
    "int8": DispatchFormat(
        dtype=DispatchDtype.INT8,
        scale_layout=ScaleLayout.PER_TOKEN,
        scale_format=ScaleFormat.FLOAT32,
    ),
}
REQUEST = TokenDispatcherRequest(
    role=ModelRole.MAIN,
    layer="model.layers.3.mlp",
    num_experts=EXPERTS,
    num_experts_per_tok=CHOICES,
    hidden_size=HIDDEN,
)

every_generation = pytest.mark.parametrize("generation", Generation)
every_format = pytest.mark.parametrize("name", FORMATS)


def dispatcher(
    generation: Generation = Generation.A2, request: TokenDispatcherRequest = REQUEST
) -> RoutingDispatcher:
    exchanges = Exchanges(
        vendor.load_emulator(Options(generation=generation.value)), "auto", VendorEnvironment()
    )
    made = exchanges.create_token_dispatcher(request)
    assert isinstance(made, RoutingDispatcher)
    return made


def inputs(ids: list[list[int]], name: str) -> tuple[torch.Tensor, Routing]:
    generator = torch.Generator().manual_seed(len(ids))
    dtype = torch.float32 if name == "fp32" else torch.bfloat16
    return torch.randn(len(ids), HIDDEN, generator=generator).to(dtype), Routing(
        topk_ids=torch.tensor(ids, dtype=torch.int64).view(len(ids), CHOICES),
        topk_weights=torch.rand(len(ids), CHOICES, generator=generator),
    )


def experts(tokens: DispatchedTokens, dtype: torch.dtype) -> torch.Tensor:
    """Experts that multiply by their number plus one; what is in no group is not a number."""
    made = torch.full((tokens.rows.shape[0], HIDDEN), torch.nan, dtype=dtype)
    start = 0
    for expert, count in enumerate(tokens.group_list.tolist()):
        group = slice(start, start + count)
        scales = None if tokens.scales is None else tokens.scales[group]
        plain = dequantise_rows(tokens.rows[group], scales, tokens.format, torch.float32)
        made[group] = (plain * (expert + 1)).to(dtype)
        start += count
    return made


ids_of_tokens = st.lists(
    st.lists(st.integers(-1, EXPERTS - 1), min_size=CHOICES, max_size=CHOICES), max_size=9
)


@settings(max_examples=40, deadline=None)
@given(ids_of_tokens, st.sampled_from(Generation), st.sampled_from(sorted(FORMATS)))
def test_it_is_the_portable_exchange(
    ids: list[list[int]], generation: Generation, name: str
) -> None:
    hidden, routing = inputs(ids, name)
    ours = dispatcher(generation)
    portable = create_portable_dispatcher(REQUEST, ExpertParallelGroup(), poison=True)
    tokens, handle = ours.dispatch(hidden, routing, FORMATS[name])
    expected, expected_handle = portable.dispatch(hidden, routing, FORMATS[name])

    assert tokens.group_list.dtype is torch.int64
    assert tokens.group_list_kind is GroupListKind.COUNTS
    assert tokens.routing_weight_side is RoutingWeightSide.COMBINE
    assert torch.equal(tokens.group_list, expected.group_list)
    num_rows = int(tokens.group_list.sum())
    rows, wanted = tokens.rows[:num_rows], expected.rows[:num_rows]
    assert rows.dtype is wanted.dtype
    if name == "int8":
        assert tokens.scales is not None
        assert expected.scales is not None
        assert int((rows.int() - wanted.int()).abs().max() if num_rows else 0) <= 1
        torch.testing.assert_close(tokens.scales[:num_rows], expected.scales[:num_rows])
    else:
        assert tokens.scales is None
        assert torch.equal(rows, wanted)

    made = experts(tokens, hidden.dtype)
    combined = ours.combine(made, handle)
    assert combined.dtype is hidden.dtype
    tolerance = {"rtol": 8e-3, "atol": 2e-2 if name == "int8" else 8e-3}
    of_portable = portable.combine(experts(expected, hidden.dtype), expected_handle)
    torch.testing.assert_close(combined, of_portable, **tolerance)


@every_generation
@every_format
def test_experts_that_do_nothing_give_the_token_times_the_sum_of_its_weights(
    generation: Generation, name: str
) -> None:
    hidden, routing = inputs([[0, 1, 2], [5, 5, 3], [4, -1, -1], [-1, -1, -1]], name)
    ours = dispatcher(generation)
    tokens, handle = ours.dispatch(hidden, routing, FORMATS[name])
    plain = dequantise_rows(tokens.rows, tokens.scales, tokens.format, hidden.dtype)
    there = int(tokens.group_list.sum())
    plain[there:] = torch.nan
    sums = routing.topk_weights.masked_fill(routing.topk_ids < 0, 0).sum(1, keepdim=True)
    expected = (hidden.float() * sums).to(hidden.dtype)
    atol = 3e-2 if name == "int8" else 1e-3
    torch.testing.assert_close(ours.combine(plain, handle), expected, rtol=1e-2, atol=atol)


@every_generation
@every_format
def test_no_token(generation: Generation, name: str) -> None:
    hidden, routing = inputs([], name)
    ours = dispatcher(generation)
    tokens, handle = ours.dispatch(hidden, routing, FORMATS[name])
    assert tokens.rows.shape == (0, HIDDEN)
    assert tokens.rows.dtype is (torch.int8 if name == "int8" else hidden.dtype)
    assert tokens.group_list.tolist() == [0] * EXPERTS
    assert (tokens.scales is None) is (name != "int8")
    combined = ours.combine(torch.empty(0, HIDDEN, dtype=hidden.dtype), handle)
    assert combined.shape == (0, HIDDEN)
    assert combined.dtype is hidden.dtype


@every_generation
def test_no_choice_at_all_gives_zeros_although_no_row_was_written(generation: Generation) -> None:
    hidden, routing = inputs([[-1, -1, -1]] * 2, "bf16")
    ours = dispatcher(generation)
    tokens, handle = ours.dispatch(hidden, routing, FORMATS["bf16"])
    assert tokens.rows.isnan().all(), "what the device leaves unwritten"
    combined = ours.combine(tokens.rows, handle)
    assert torch.equal(combined, torch.zeros_like(hidden))


def test_two_dispatches_may_be_under_way_at_once() -> None:
    ours = dispatcher()
    first, second = inputs([[0, 1, 2]], "bf16"), inputs([[3, 4, 5], [0, 0, 0]], "bf16")
    handled = [ours.dispatch(*one, FORMATS["bf16"]) for one in (first, second)]
    for (hidden, routing), (tokens, handle) in zip((first, second), handled, strict=True):
        sums = routing.topk_weights.sum(1, keepdim=True)
        torch.testing.assert_close(
            ours.combine(tokens.rows, handle),
            (hidden.float() * sums).bfloat16(),
            rtol=1e-2,
            atol=1e-3,
        )


def test_a_low_latency_dispatch_keeps_to_its_capacity() -> None:
    request = replace(REQUEST, mode=DispatchMode.LOW_LATENCY, max_tokens_per_rank=2)
    low_latency = replace(FORMATS["bf16"], mode=DispatchMode.LOW_LATENCY)
    ours = dispatcher(request=request)
    hidden, routing = inputs([[0, 1, 2]] * 2, "bf16")
    ours.dispatch(hidden, routing, low_latency)
    hidden, routing = inputs([[0, 1, 2]] * 3, "bf16")
    with pytest.raises(CapacityError, match="3 tokens in a low-latency exchange"):
        ours.dispatch(hidden, routing, low_latency)


def test_rows_of_another_dtype_than_the_formats_are_refused() -> None:
    hidden, routing = inputs([[0, 1, 2]], "bf16")
    with pytest.raises(ContractError, match=r"layer model.layers.3.mlp: torch.bfloat16 rows"):
        dispatcher().dispatch(hidden, routing, FORMATS["fp32"])
    masked = replace(FORMATS["bf16"], row_layout=RowLayout.MASKED)
    with pytest.raises(ContractError, match="bf16 rows are to be dispatched, masked"):
        dispatcher().dispatch(hidden, routing, masked)


def test_rows_that_are_missing_are_not_combined() -> None:
    hidden, routing = inputs([[0, 1, 2]], "bf16")
    ours = dispatcher()
    tokens, handle = ours.dispatch(hidden, routing, FORMATS["bf16"])
    with pytest.raises(ContractError, match="3 dispatched rows"):
        ours.combine(tokens.rows[:2], handle)


def test_formats_that_are_not_routed_here_are_left_to_the_core() -> None:
    exchanges = Exchanges(vendor.load_emulator(Options()), "auto", VendorEnvironment())
    fp8 = DispatchFormat(
        dtype=DispatchDtype.FP8_E4M3,
        scale_layout=ScaleLayout.PER_TOKEN_128,
        scale_format=ScaleFormat.FLOAT32,
    )
    assert exchanges.create_token_dispatcher(replace(REQUEST, format=fp8)) is NOT_SUPPORTED
