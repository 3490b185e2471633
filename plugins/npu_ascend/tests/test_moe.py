"""Experts on the device give what the schemes define, up to the roundings that are documented."""

from __future__ import annotations

from dataclasses import astuple, replace
from itertools import product as pairs
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plugins.npu_ascend.tests.balls import Ball, Chip, Integers, expert, product, swiglu
from plugins.npu_ascend.tests.experts import (
    FORMS,
    LAYER,
    Sizes,
    cumulative,
    of_expert,
    on,
    plain_tokens,
    quantised,
    random_experts,
    serves,
)

from mortise.errors import ContractError
from mortise.plugin import (
    DispatchMode,
    GroupListKind,
    RoutingWeightSide,
    RowLayout,
    WeightScheme,
)
from mortise.reference import moe as reference
from mortise.testing.poison import poison_undefined_rows
from mortise_npu_ascend import moe
from mortise_npu_ascend.dispatch import Generation
from mortise_npu_ascend.products.base import Kind, quantise
from mortise_npu_ascend.products.int4_by_int8 import Int4ByInt8Product
from mortise_npu_ascend.weights import PreparedExperts, prepare_expert_weights

if TYPE_CHECKING:
    from mortise.plugin import DispatchedTokens, ExpertWeights
    from mortise_npu_ascend.vendor import Vendor

TILED, UNEVEN = Sizes(), Sizes(hidden=160, intermediate=40)
COUNTS = [5, 0, 3]
CONSUMES_INT8 = {WeightScheme.W8A8, WeightScheme.W4A8}
CHIPS = [Chip(Generation.A2, strict=True), Chip(Generation.A3), Chip(Generation.A5)]

every_form = pytest.mark.parametrize("form", FORMS)
bf16 = torch.bfloat16

# What the A5 refuses is in test_backend.py.
SERVED = [(form, chip) for form in FORMS for chip in CHIPS if serves(chip, form)]
SERVED_PAIRS = [
    (w13, w2, chip) for (w13, chip), (w2, other) in pairs(SERVED, repeat=2) if chip is other
]
SHAPES = (UNEVEN, Sizes(num_experts=1), Sizes(512, 64, 2))
SERVED_SHAPES = [(form, chip, sizes) for form, chip in SERVED for sizes in SHAPES]
served = pytest.mark.parametrize(("form", "chip"), SERVED, ids=str)


def applied(
    loaded: Vendor,
    tokens: DispatchedTokens,
    experts: ExpertWeights,
    out_dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    prepared = prepare_expert_weights(loaded, experts)
    return moe.quantized_moe_apply(loaded, tokens, prepared, out_dtype)


def arrivals(experts: ExpertWeights, tokens: DispatchedTokens) -> list[DispatchedTokens]:
    """The same rows in each format that the experts consume."""
    takes_int8 = experts.w13.scheme in CONSUMES_INT8
    return [tokens, quantised(tokens)] if takes_int8 else [tokens]


def ball_of(tokens: DispatchedTokens, experts: ExpertWeights, chip: Chip) -> Ball:
    """Of the rows of all experts."""
    balls, start = [], 0
    for number, count in enumerate(tokens.group_list.tolist()):
        rows = slice(start, start + count)
        start += count
        if count:
            shares = (of_expert(stored, number) for stored in (experts.w13, experts.w2))
            balls.append(expert(taken(tokens, rows), *shares, chip))
    return Ball(*(np.concatenate(parts) for parts in zip(*map(astuple, balls), strict=True)))


def taken(tokens: DispatchedTokens, rows: slice) -> Ball | Integers:
    if tokens.scales is None:
        return Ball.exactly(tokens.rows[rows])
    return Integers.arrived(tokens.rows[rows], tokens.scales[rows])


def is_within(result: torch.Tensor, ball: Ball) -> bool:
    """No number outside its ball, and on average none as far off as its spread."""
    rows = result[: len(ball.center)]
    off = rows.double().numpy() - ball.center
    return not len(ball.misses(rows)) and (off**2).mean() <= (ball.spread**2).mean()


@pytest.mark.parametrize(("w13", "w2", "chip"), SERVED_PAIRS, ids=str)
def test_any_two_schemes(w13: str, w2: str, chip: Chip) -> None:
    experts = random_experts(w13, w2, TILED)
    for tokens in arrivals(experts, plain_tokens(COUNTS, TILED.hidden)):
        ball = ball_of(tokens, experts, chip)
        assert is_within(applied(on(chip), tokens, experts), ball)
        assert is_within(reference.quantized_moe_apply(tokens, experts, bf16), ball)


@pytest.mark.parametrize(("form", "chip", "sizes"), SERVED_SHAPES, ids=str)
def test_sizes_without_tiles_a_single_expert_and_many_columns(
    form: str, chip: Chip, sizes: Sizes
) -> None:
    experts = random_experts(form, form, sizes)
    counts = [4, 0, 3][: sizes.num_experts]
    for tokens in arrivals(experts, plain_tokens(counts, sizes.hidden)):
        ball = ball_of(tokens, experts, chip)
        assert is_within(applied(on(chip), tokens, experts), ball)


def test_float32_experts() -> None:
    experts = random_experts("float", "float", TILED, dtype=torch.float32)
    tokens = plain_tokens(COUNTS, TILED.hidden, dtype=torch.float32)
    for chip in CHIPS:
        got = applied(on(chip), tokens, experts, torch.float32)[: sum(COUNTS)]
        expected = reference.quantized_moe_apply(tokens, experts, torch.float32)[: sum(COUNTS)]
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", ["w8a8", "w4a8"])
def test_a_wrong_order_of_the_halves_would_be_seen(form: str) -> None:
    """The judge is not so lenient that gate and up could change places."""
    chip = Chip(Generation.A2)
    experts = random_experts(form, form, TILED)
    tokens = plain_tokens([8, 0, 0], TILED.hidden)
    w13, w2 = (of_expert(stored, 0) for stored in (experts.w13, experts.w2))
    first = product(taken(tokens, slice(8)), w13, chip)
    swapped = Ball(*(np.roll(part, TILED.intermediate, axis=1) for part in astuple(first)))
    assert not is_within(applied(on(chip), tokens, experts), product(swiglu(swapped), w2, chip))


def test_a_wrong_assist_bias_would_be_seen() -> None:
    """Nothing but the bias tells the device what the lower halves of the rows were lowered by."""
    chip = Chip(Generation.A2)
    loaded, experts = on(chip), random_experts("w4a8", "float", TILED)
    tokens = plain_tokens(COUNTS, TILED.hidden)
    ball = ball_of(tokens, experts, chip)
    prepared = prepare_expert_weights(loaded, experts)
    layout = prepared.prepared
    assert isinstance(layout, PreparedExperts)
    assert isinstance(layout.w13, Int4ByInt8Product)
    assert is_within(moe.quantized_moe_apply(loaded, tokens, prepared, bf16), ball)
    for factor in (0.0, 0.5, 2.0):
        wrong = replace(layout.w13, assist_bias=layout.w13.assist_bias * factor)
        spoilt = replace(prepared, prepared=replace(layout, w13=wrong))
        assert not is_within(moe.quantized_moe_apply(loaded, tokens, spoilt, bf16), ball)


@served
def test_rows_of_no_group_are_not_read_and_lists_of_both_kinds_agree(form: str, chip: Chip) -> None:
    experts, loaded = random_experts(form, form, TILED), on(chip)
    prepared = prepare_expert_weights(loaded, experts)
    for tokens in arrivals(experts, plain_tokens(COUNTS, TILED.hidden, behind=4)):
        clean = replace(
            tokens,
            rows=tokens.rows[: sum(COUNTS)],
            scales=None if tokens.scales is None else tokens.scales[: sum(COUNTS)],
        )
        expected = moe.quantized_moe_apply(loaded, clean, prepared, bf16)
        for variant in (tokens, cumulative(tokens)):
            poisoned = poison_undefined_rows(variant)
            got = moe.quantized_moe_apply(loaded, poisoned, prepared, bf16)
            assert got.shape == (sum(COUNTS) + 4, TILED.hidden)
            assert torch.equal(got[: sum(COUNTS)], expected)


@settings(deadline=None, derandomize=True, max_examples=25)
@given(
    counts=st.lists(st.integers(0, 4), min_size=3, max_size=3),
    form=st.sampled_from(sorted(FORMS)),
    kind=st.sampled_from(GroupListKind),
)
def test_an_expert_sees_its_own_rows_alone(
    counts: list[int], form: str, kind: GroupListKind
) -> None:
    """Results of an expert's rows are those of the same rows without the other experts."""
    loaded, experts = on(Chip(Generation.A2)), random_experts(form, form, TILED)
    prepared = prepare_expert_weights(loaded, experts)
    tokens = plain_tokens(counts, TILED.hidden)
    together = moe.quantized_moe_apply(
        loaded, cumulative(tokens) if kind is GroupListKind.CUMULATIVE else tokens, prepared, bf16
    )
    assert together.shape == (sum(counts), TILED.hidden)
    start = 0
    for number, count in enumerate(counts):
        own = replace(
            tokens,
            rows=tokens.rows[start : start + count],
            group_list=torch.tensor([count if one == number else 0 for one in range(3)]),
        )
        alone = moe.quantized_moe_apply(loaded, own, prepared, bf16)
        assert torch.equal(together[start : start + count], alone)
        start += count


@every_form
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32])
def test_no_rows(form: str, out_dtype: torch.dtype) -> None:
    experts = random_experts(form, form, TILED)
    for tokens in arrivals(experts, plain_tokens([0, 0, 0], TILED.hidden)):
        result = applied(on(Chip(Generation.A2)), tokens, experts, out_dtype)
        assert (result.shape, result.dtype) == ((0, TILED.hidden), out_dtype)


def test_int8_rows_are_those_the_experts_would_make() -> None:
    """The device and the core's exchanges quantise alike, but for the last bit of a scale."""
    tokens = plain_tokens(COUNTS, TILED.hidden)
    arrived = quantised(tokens)
    for generation in (Generation.A2, Generation.A3):
        made = quantise(on(Chip(generation)).torch_npu, tokens.rows, Kind.INT8)
        assert torch.equal(made.values, arrived.rows)
        torch.testing.assert_close(made.scales, arrived.scales, rtol=2.0**-22, atol=0)


@every_form
def test_the_rows_that_were_handed_over_stay_what_they_were(form: str) -> None:
    """The kernel of int4 weights overwrites int8 rows, and a strict chip does so too."""
    sizes = Sizes(256, 64, 2)
    experts = random_experts(form, form, sizes)
    for tokens in arrivals(experts, plain_tokens([3, 4], sizes.hidden)):
        before = tokens.rows.clone()
        loaded = on(Chip(Generation.A2, strict=True))
        first = applied(loaded, tokens, experts)
        assert torch.equal(tokens.rows, before)
        assert torch.equal(applied(loaded, tokens, experts), first)


@every_form
def test_routing_weights_where_the_experts_multiply(form: str) -> None:
    experts, loaded = random_experts(form, form, TILED), on(Chip(Generation.A2))
    tokens = plain_tokens(COUNTS, TILED.hidden)
    weights = torch.rand(sum(COUNTS), generator=torch.Generator().manual_seed(1))
    weighted = replace(tokens, routing_weight_side=RoutingWeightSide.EXPERTS, row_weights=weights)
    plain = applied(loaded, tokens, experts).float()
    got = applied(loaded, weighted, experts, torch.float32)
    assert torch.equal(got, plain * weights.unsqueeze(1))


def test_an_exchange_that_is_under_way_is_waited_for() -> None:
    experts, loaded = random_experts("w8a8", "w8a8", TILED), on(Chip(Generation.A2))
    tokens = quantised(plain_tokens(COUNTS, TILED.hidden))
    expected = applied(loaded, tokens, experts)
    rows, scales = torch.zeros_like(tokens.rows), torch.zeros_like(tokens.scales)

    def receive() -> None:
        rows.copy_(tokens.rows)
        scales.copy_(tokens.scales)

    waiting = replace(tokens, rows=rows, scales=scales, receive=receive)
    assert torch.equal(applied(loaded, waiting, experts), expected)


def test_experts_that_nobody_prepared_are_prepared_for_the_call() -> None:
    experts, loaded = random_experts("w4a8", "w8a8", TILED), on(Chip(Generation.A2))
    tokens = plain_tokens(COUNTS, TILED.hidden)
    unprepared = moe.quantized_moe_apply(loaded, tokens, experts, bf16)
    rows = slice(sum(COUNTS))
    assert torch.equal(unprepared[rows], applied(loaded, tokens, experts)[rows])


def test_int8_rows_never_meet_experts_that_cannot_multiply_them() -> None:
    tokens = quantised(plain_tokens(COUNTS, TILED.hidden))
    for form in ("float", "w4a4", "w4a16"):
        experts = random_experts(form, "w8a8", TILED)
        with pytest.raises(ContractError, match=f"layer {LAYER}: int8 rows met"):
            applied(on(Chip(Generation.A2)), tokens, experts)


@pytest.mark.parametrize("generation", Generation)
@pytest.mark.parametrize("weight_format", ["nz", "nd"])
def test_the_emulator_refuses_them_too_if_they_are_forced(
    generation: Generation, weight_format: str
) -> None:
    loaded = on(Chip(generation), weight_format=weight_format)
    prepared = prepare_expert_weights(loaded, random_experts("float", "float", TILED)).prepared
    assert isinstance(prepared, PreparedExperts)
    with pytest.raises(RuntimeError, match="DT_INT8 and weight dtype DT_BFLOAT16"):
        loaded.torch_npu.npu_grouped_matmul(
            [torch.zeros(2, TILED.hidden, dtype=torch.int8)],
            [prepared.w13.weight],
            split_item=2,
            group_type=0,
            group_list=torch.tensor([1, 1, 0]),
            group_list_type=1,
            output_dtype=torch.bfloat16,
        )


def test_rows_with_gaps_between_the_groups_are_refused() -> None:
    experts, loaded = random_experts("float", "float", TILED), on(Chip(Generation.A2))
    tokens = plain_tokens(COUNTS, TILED.hidden)
    aligned = replace(tokens.format, row_layout=RowLayout.GROUPED_ALIGNED, alignment=4)
    masked = replace(tokens.format, row_layout=RowLayout.MASKED, mode=DispatchMode.LOW_LATENCY)
    for variant in (
        replace(tokens, format=aligned),
        replace(tokens, format=masked, rows=torch.zeros(3, 5, TILED.hidden, dtype=bf16)),
    ):
        with pytest.raises(ContractError, match=f"layer {LAYER}: the rows came ") as caught:
            applied(loaded, variant, experts)
        assert "grouped" in str(caught.value.expected)
    packed = replace(aligned, alignment=1)
    rows = slice(sum(COUNTS))
    got = applied(loaded, replace(tokens, format=packed), experts)[rows]
    assert torch.equal(got, applied(loaded, tokens, experts)[rows])


def test_models_of_one_process_do_not_touch_each_other() -> None:
    """A quantised model and a draft that is not, on chips of two generations, in turns."""
    main = on(Chip(Generation.A2)), random_experts("w8a8", "w4a8", TILED)
    draft = on(Chip(Generation.A5, strict=True)), random_experts("float", "float", TILED, seed=9)
    rows = slice(sum(COUNTS))
    tokens = plain_tokens(COUNTS, TILED.hidden)
    alone = [applied(loaded, tokens, experts)[rows] for loaded, experts in (main, draft)]
    prepared = [
        (loaded, prepare_expert_weights(loaded, experts)) for loaded, experts in (draft, main)
    ]
    for _ in range(2):
        for (loaded, experts), expected in zip(prepared, reversed(alone), strict=True):
            got = moe.quantized_moe_apply(loaded, tokens, experts, bf16)[rows]
            assert torch.equal(got, expected)
