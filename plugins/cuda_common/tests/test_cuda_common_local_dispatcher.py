"""One process's rows through permute and unpermute: what the core's own exchange makes too."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.fixtures.cuda_ranks import runtime_of
from tests.fixtures.dispatch_formats import FORMATS

from mortise.errors import CapacityError, ContractError
from mortise.formats.rows import dequantise_rows
from mortise.plugin import (
    NOT_SUPPORTED,
    DispatchedTokens,
    DispatchFormat,
    DispatchMode,
    GroupListKind,
    ModelRole,
    Routing,
    RoutingWeightSide,
    RowLayout,
    TokenDispatcherRequest,
)
from mortise.reference.dispatch import LocalDispatcher
from mortise.testing.poison import defined_rows
from mortise_cuda_common.environment import VendorEnvironment
from mortise_cuda_common.exchanges import Exchanges
from mortise_cuda_common.local import ProgramDispatcher

if TYPE_CHECKING:
    from plugins.cuda_common.tests.kernel_cases import Machine

EXPERTS, CHOICES, HIDDEN, CAPACITY = 5, 3, 160, 9

PERMUTED = ("fp32", "bf16", "fp8 under float32", "fp8 under ue8m0")
LAYOUTS = {
    "grouped": (DispatchMode.NORMAL, RowLayout.GROUPED, 1),
    "aligned": (DispatchMode.NORMAL, RowLayout.GROUPED_ALIGNED, 8),
    "masked": (DispatchMode.LOW_LATENCY, RowLayout.MASKED, 1),
}
REQUEST = TokenDispatcherRequest(
    role=ModelRole.MAIN,
    layer="model.layers.3.mlp",
    num_experts=EXPERTS,
    num_experts_per_tok=CHOICES,
    hidden_size=HIDDEN,
    max_tokens_per_rank=CAPACITY,
)

every_format = pytest.mark.parametrize("name", PERMUTED)
every_layout = pytest.mark.parametrize("layout", LAYOUTS)


def format_of(name: str, layout: str) -> DispatchFormat:
    mode, row_layout, alignment = LAYOUTS[layout]
    return replace(FORMATS[name], mode=mode, row_layout=row_layout, alignment=alignment)


def exchanges_of(machine: Machine) -> Exchanges:
    runtime = replace(
        runtime_of(),
        programs=machine.programs,
        device=machine.device,
        emulated=machine.is_emulated,
    )
    return Exchanges(runtime, "auto", "cuda_hopper", VendorEnvironment())


def dispatcher(format: DispatchFormat, machine: Machine) -> ProgramDispatcher:
    exchanges = exchanges_of(machine)
    made = exchanges.create_token_dispatcher(replace(REQUEST, format=format, mode=format.mode))
    assert isinstance(made, ProgramDispatcher)
    return made


def inputs(ids: list[list[int]], name: str, machine: Machine) -> tuple[torch.Tensor, Routing]:
    generator = torch.Generator().manual_seed(len(ids))
    dtype = torch.float32 if name == "fp32" else torch.bfloat16
    hidden = machine.on(torch.randn(len(ids), HIDDEN, generator=generator).to(dtype))
    return hidden, Routing(
        topk_ids=machine.on(torch.tensor(ids, dtype=torch.int64).view(len(ids), CHOICES)),
        topk_weights=machine.on(torch.rand(len(ids), CHOICES, generator=generator)),
    )


def experts(tokens: DispatchedTokens, dtype: torch.dtype) -> torch.Tensor:
    """Experts that multiply by their number plus one; what is in no group is not a number."""
    made = tokens.rows.new_full((*tokens.rows.shape[:-1], HIDDEN), torch.nan, dtype=dtype)
    plain = dequantise_rows(tokens.rows, tokens.scales, tokens.format, torch.float32)
    experts = torch.arange(1, EXPERTS + 1, device=made.device)
    numbers = experts.repeat_interleave(tokens.group_list)
    defined = defined_rows(tokens)
    made[defined] = (plain[defined] * numbers.unsqueeze(1)).to(dtype)
    return made


def defined_bytes(tokens: DispatchedTokens, part: torch.Tensor) -> torch.Tensor:
    return part.contiguous().view(torch.uint8)[defined_rows(tokens)]


ids_of_tokens = st.lists(
    st.lists(st.integers(-1, EXPERTS - 1), min_size=CHOICES, max_size=CHOICES), max_size=CAPACITY
)


@settings(max_examples=40, deadline=None)
@given(ids_of_tokens, st.sampled_from(PERMUTED), st.sampled_from(sorted(LAYOUTS)))
def test_it_is_the_cores_exchange(
    machine: Machine, ids: list[list[int]], name: str, layout: str
) -> None:
    hidden, routing = inputs(ids, name, machine)
    stated = format_of(name, layout)
    ours = dispatcher(stated, machine)
    core = LocalDispatcher(EXPERTS, max_tokens_per_rank=CAPACITY, poison=True)
    tokens, handle = ours.dispatch(hidden, routing, stated)
    expected, expected_handle = core.dispatch(hidden, routing, stated)

    assert tokens.group_list.dtype is torch.int64
    assert tokens.group_list_kind is GroupListKind.COUNTS
    assert tokens.routing_weight_side is RoutingWeightSide.COMBINE
    assert torch.equal(tokens.group_list, expected.group_list)
    assert tokens.rows.dtype is expected.rows.dtype
    assert torch.equal(defined_bytes(tokens, tokens.rows), defined_bytes(expected, expected.rows))
    assert (tokens.scales is None) is (expected.scales is None)
    if tokens.scales is not None and expected.scales is not None:
        assert tokens.scales.dtype is expected.scales.dtype
        assert torch.equal(
            defined_bytes(tokens, tokens.scales), defined_bytes(expected, expected.scales)
        )

    combined = ours.combine(experts(tokens, hidden.dtype), handle)
    of_core = core.combine(experts(expected, hidden.dtype), expected_handle)
    assert combined.dtype is hidden.dtype
    # Both sum in float32, in another order, and round once.
    tolerance = {"rtol": 2e-6, "atol": 2e-5} if name == "fp32" else {"rtol": 8e-3, "atol": 1e-4}
    torch.testing.assert_close(combined, of_core, **tolerance)


@every_layout
@every_format
def test_experts_that_do_nothing_give_the_token_times_the_sum_of_its_weights(
    machine: Machine, name: str, layout: str
) -> None:
    hidden, routing = inputs([[0, 1, 2], [4, 4, 3], [3, -1, -1], [-1, -1, -1]], name, machine)
    stated = format_of(name, layout)
    ours = dispatcher(stated, machine)
    tokens, handle = ours.dispatch(hidden, routing, stated)
    plain = dequantise_rows(tokens.rows, tokens.scales, stated, hidden.dtype)
    plain[~defined_rows(tokens)] = torch.nan
    sums = routing.topk_weights.masked_fill(routing.topk_ids < 0, 0).sum(1, keepdim=True)
    # e4m3 has three bits behind the leading one.
    tolerance = 2.0**-4 * 1.1 if "fp8" in name else 1e-2
    torch.testing.assert_close(
        ours.combine(plain, handle).float(), hidden.float() * sums, rtol=tolerance, atol=1e-2
    )


@every_layout
@every_format
def test_no_token(machine: Machine, name: str, layout: str) -> None:
    hidden, routing = inputs([], name, machine)
    stated = format_of(name, layout)
    ours = dispatcher(stated, machine)
    tokens, handle = ours.dispatch(hidden, routing, stated)
    assert tokens.group_list.tolist() == [0] * EXPERTS
    assert (tokens.scales is None) is ("fp8" not in name)
    made = hidden.new_empty(*tokens.rows.shape[:-1], HIDDEN)
    combined = ours.combine(made, handle)
    assert combined.shape == (0, HIDDEN)
    assert combined.dtype is hidden.dtype


@every_layout
def test_no_choice_at_all_gives_zeros_although_no_row_was_written(
    machine: Machine, layout: str
) -> None:
    hidden, routing = inputs([[-1, -1, -1]] * 2, "bf16", machine)
    stated = format_of("bf16", layout)
    ours = dispatcher(stated, machine)
    tokens, handle = ours.dispatch(hidden, routing, stated)
    assert tokens.rows.isnan().all() or not machine.is_emulated, "what the chip leaves unwritten"
    assert torch.equal(ours.combine(tokens.rows, handle), torch.zeros_like(hidden))


def test_masked_rows_have_the_shape_of_their_capacity(machine: Machine) -> None:
    stated = format_of("fp8 under ue8m0", "masked")
    tokens, _ = dispatcher(stated, machine).dispatch(*inputs([[0, 1, 2]], "bf16", machine), stated)
    assert tokens.rows.shape == (EXPERTS, CAPACITY, HIDDEN)
    assert tokens.scales is not None
    assert tokens.scales.shape == (EXPERTS, CAPACITY, 1)


def test_two_dispatches_may_be_under_way_at_once(machine: Machine) -> None:
    stated = format_of("bf16", "aligned")
    ours = dispatcher(stated, machine)
    first, second = (
        inputs([[0, 1, 2]], "bf16", machine),
        inputs([[3, 4, 2], [0, 0, 0]], "bf16", machine),
    )
    handled = [ours.dispatch(*one, stated) for one in (first, second)]
    for (hidden, routing), (tokens, handle) in zip((first, second), handled, strict=True):
        sums = routing.topk_weights.sum(1, keepdim=True)
        torch.testing.assert_close(
            ours.combine(tokens.rows, handle),
            (hidden.float() * sums).bfloat16(),
            rtol=1e-2,
            atol=1e-3,
        )


def test_what_is_wrong_is_told(machine: Machine) -> None:
    masked = format_of("bf16", "masked")
    ours = dispatcher(masked, machine)
    with pytest.raises(CapacityError, match="10 tokens in a low-latency exchange"):
        ours.dispatch(*inputs([[0, 1, 2]] * (CAPACITY + 1), "bf16", machine), masked)
    with pytest.raises(ContractError, match=r"torch\.float32 rows are to be sent as bf16"):
        ours.dispatch(*inputs([[0, 1, 2]], "fp32", machine), masked)
    with pytest.raises(ContractError, match="int8 rows are to be dispatched"):
        ours.dispatch(*inputs([[0, 1, 2]], "bf16", machine), FORMATS["int8"])
    tokens, handle = ours.dispatch(*inputs([[0, 1, 2]], "bf16", machine), masked)
    with pytest.raises(ContractError, match="the experts made"):
        ours.combine(tokens.rows[:-1], handle)


@pytest.mark.parametrize("format", [FORMATS["int8"], FORMATS["nvfp4"], None])
def test_other_formats_are_the_cores(machine: Machine, format: DispatchFormat | None) -> None:
    exchanges = exchanges_of(machine)
    assert exchanges.create_token_dispatcher(replace(REQUEST, format=format)) is NOT_SUPPORTED
