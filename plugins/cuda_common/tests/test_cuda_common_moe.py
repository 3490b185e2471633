"""Experts on the chip give what the schemes define, up to the roundings that are documented."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plugins.cuda_common.tests import fp8_balls as balls
from plugins.cuda_common.tests.expert_cases import (
    FORMS,
    LAYER,
    MACHINES,
    SM90,
    SM100,
    TILED,
    UNEVEN,
    Machine,
    Sizes,
    arrivals,
    ball_of,
    calc_diff,
    defined,
    grouped,
    layouts,
    masked,
    of_expert,
    permuted,
    places,
    quantised,
    random_experts,
    random_rows,
)

from mortise.errors import ContractError
from mortise.formats.weights import dequantise_weight, quantise_weight
from mortise.plugin import RoutingWeightSide, ScaleFormat
from mortise.reference import moe as reference
from mortise.testing.poison import poison_undefined_rows
from mortise_cuda_common import moe
from mortise_cuda_common.experts import PreparedExperts, prepare_expert_weights
from mortise_cuda_common.products.select import Products

if TYPE_CHECKING:
    from mortise.plugin import DispatchedTokens, ExpertWeights, StoredWeight

COUNTS = [5, 0, 3]
CLOSE = 1e-3
"""The largest ``calc_diff`` that DeepGEMM's own tests let through."""

every_form = pytest.mark.parametrize("form", FORMS)
every_machine = pytest.mark.parametrize("machine", MACHINES, ids=str)
bf16 = torch.bfloat16

TRITON_90, DEEP_GEMM_90 = Machine(SM90, "triton"), Machine(SM90, "deep_gemm")
DEEP_GEMM_100 = Machine(SM100, "deep_gemm")


def is_requantised(machine: Machine, *forms: str) -> bool:
    """Weights that DeepGEMM multiplies on Blackwell once their scales are powers of two."""
    return machine == DEEP_GEMM_100 and "fp8" in forms


STORED_PAIRS = [
    (w13, w2, machine)
    for machine in MACHINES
    for w13 in FORMS
    for w2 in FORMS
    if not is_requantised(machine, w13, w2)
]


def applied(
    machine: Machine | Products,
    tokens: DispatchedTokens,
    experts: ExpertWeights,
    out_dtype: torch.dtype = bf16,
) -> torch.Tensor:
    products = machine.products() if isinstance(machine, Machine) else machine
    prepared = prepare_expert_weights(products, experts)
    poisoned = poison_undefined_rows(tokens)
    return moe.quantized_moe_apply(products, poisoned, prepared, out_dtype)


@pytest.mark.parametrize(("w13", "w2", "machine"), STORED_PAIRS, ids=str)
def test_any_two_schemes(w13: str, w2: str, machine: Machine) -> None:
    experts, rows = random_experts(w13, w2), random_rows(COUNTS, TILED.hidden)
    for plain in (grouped(rows), masked(rows, 8)):
        for tokens in arrivals(experts, plain):
            if machine == DEEP_GEMM_100 and tokens.format.scale_format is ScaleFormat.FLOAT32:
                continue  # Such rows are quantised once more; see below.
            ball = ball_of(tokens, experts)
            got = defined(applied(machine, tokens, experts), tokens)
            expected = reference.quantized_moe_apply(tokens, experts, bf16)
            assert ball.holds(got)
            assert ball.holds(defined(expected, tokens))
            assert calc_diff(got, defined(expected, tokens)) < CLOSE


@every_form
@every_machine
def test_a_layout_changes_nothing(form: str, machine: Machine) -> None:
    """Bit for bit: tiles of rows may be others, and the sums of a row are the same."""
    experts, rows = random_experts(form, form), random_rows(COUNTS, TILED.hidden)
    products = machine.products()
    results = {
        name: defined(applied(products, tokens, experts), tokens)
        for name, tokens in layouts(rows).items()
    }
    first = results.pop("grouped")
    assert first.isfinite().all()
    for name, result in results.items():
        assert torch.equal(result, first), name


@every_form
@pytest.mark.parametrize("machine", [TRITON_90, Machine(SM100)], ids=str)
@pytest.mark.parametrize("sizes", [UNEVEN, Sizes(128, 192, 1), Sizes(384, 40, 2)], ids=str)
def test_sizes_that_no_tile_divides_and_a_single_expert(
    form: str, machine: Machine, sizes: Sizes
) -> None:
    """Parts of w13 whose last block of rows is partial, among others: triton serves them all."""
    experts = random_experts(form, form, sizes)
    rows = random_rows([4, 0, 3][: sizes.num_experts], sizes.hidden)
    for plain in (grouped(rows, behind=2), masked(rows, 5)):
        for tokens in arrivals(experts, plain):
            got = defined(applied(machine, tokens, experts), tokens)
            assert ball_of(tokens, experts).holds(got)


@pytest.mark.parametrize("machine", [TRITON_90, DEEP_GEMM_90], ids=str)
def test_as_many_rows_as_no_tile_holds(machine: Machine) -> None:
    """Groups of more than 128 rows, of exactly as many, and of one."""
    sizes = Sizes(num_experts=4)
    experts = random_experts("fp8", "fp8", sizes)
    tokens = grouped(random_rows([1, 128, 0, 131], sizes.hidden))
    got = defined(applied(machine, tokens, experts), tokens)
    assert ball_of(tokens, experts).holds(got)


@pytest.mark.parametrize("machine", MACHINES, ids=str)
def test_float32_experts_are_exact(machine: Machine) -> None:
    experts = random_experts("float", "float", dtype=torch.float32)
    rows = random_rows(COUNTS, TILED.hidden, dtype=torch.float32)
    for tokens in layouts(rows).values():
        got = defined(applied(machine, tokens, experts, torch.float32), tokens)
        expected = reference.quantized_moe_apply(tokens, experts, torch.float32)
        torch.testing.assert_close(got, defined(expected, tokens), rtol=1e-5, atol=1e-5)


def with_powers_of_two(stored: StoredWeight) -> StoredWeight:
    """As the format itself quantises the numbers again."""
    return quantise_weight(
        dequantise_weight(stored),
        stored.scheme,
        scale_format=ScaleFormat.UE8M0,
        num_parts=stored.num_parts,
    )


def test_deep_gemm_on_blackwell_multiplies_by_weights_quantised_again_if_it_was_asked_for() -> None:
    experts = random_experts("fp8", "fp8")
    again = replace(experts, w13=with_powers_of_two(experts.w13), w2=with_powers_of_two(experts.w2))
    for plain in layouts(random_rows(COUNTS, TILED.hidden)).values():
        for tokens in (plain, quantised(plain, ScaleFormat.UE8M0)):
            got = defined(applied(DEEP_GEMM_100, tokens, experts), tokens)
            assert ball_of(tokens, again).holds(got)


@pytest.mark.parametrize("form", ["fp8", "fp8 powers"])
def test_rows_whose_scales_blackwell_does_not_multiply_are_quantised_once_more(form: str) -> None:
    experts = random_experts(form, form)
    for plain in layouts(random_rows(COUNTS, TILED.hidden)).values():
        tokens = quantised(plain)
        got = defined(applied(DEEP_GEMM_100, tokens, experts), tokens)
        expected = reference.quantized_moe_apply(tokens, experts, bf16)
        # One more e4m3 rounding is wrong by 2**-4 at most, and its square by 2**-10 on average.
        # There are up to two in each product, of rows and weights, and those before SwiGLU count
        # twice; the measure is half of their sum, which leaves a factor of two for chance.
        assert calc_diff(got, defined(expected, tokens)) < 6 * 2.0**-10


def test_a_wrong_order_of_the_halves_would_be_seen() -> None:
    """The judge is not so lenient that gate and up could change places."""
    experts = random_experts("fp8", "fp8")
    tokens = grouped(random_rows([8, 0, 0], TILED.hidden))
    w13, w2 = (of_expert(stored, 0) for stored in (experts.w13, experts.w2))
    first = balls.product(balls.taken(balls.Ball.exactly(tokens.rows), w13), w13)
    swapped = balls.Ball(
        *(
            np.roll(part, TILED.intermediate, axis=1)
            for part in (first.center, first.radius, first.spread)
        )
    )
    between = balls.swiglu(swapped.rounded(balls.BF16))
    wrong = balls.product(balls.taken(between, w2), w2).rounded(balls.BF16)
    assert not wrong.holds(applied(TRITON_90, tokens, experts))


def test_the_scales_of_another_part_would_be_seen() -> None:
    experts = random_experts("fp8", "fp8", Sizes(intermediate=72))
    tokens = grouped(random_rows(COUNTS, TILED.hidden))
    assert experts.w13.scale is not None
    flipped = replace(experts.w13, scale=experts.w13.scale.flip(1))
    got = applied(TRITON_90, tokens, replace(experts, w13=flipped))
    assert not ball_of(tokens, experts).holds(defined(got, tokens))


@settings(deadline=None, derandomize=True, max_examples=20)
@given(
    counts=st.lists(st.integers(0, 4), min_size=3, max_size=3),
    form=st.sampled_from(sorted(FORMS)),
    machine=st.sampled_from(MACHINES),
    slots=st.booleans(),
)
def test_an_expert_sees_its_own_rows_alone(
    counts: list[int], form: str, machine: Machine, slots: bool
) -> None:
    """Results of an expert's rows are those of the same rows without the other experts."""
    products, experts = machine.products(), random_experts(form, form)
    rows = random_rows(counts, TILED.hidden)

    def arranged(parts: list[torch.Tensor]) -> DispatchedTokens:
        return masked(parts, 4) if slots else grouped(parts)

    tokens = arranged(rows)
    together = applied(products, tokens, experts)
    assert together.shape == (*tokens.rows.shape[:-1], TILED.hidden)
    for number, place in enumerate(places(tokens)):
        alone = arranged([part if one == number else part[:0] for one, part in enumerate(rows)])
        result = defined(applied(products, alone, experts), alone)
        assert torch.equal(together.flatten(0, -2)[place], result)


@every_form
@pytest.mark.parametrize("machine", [TRITON_90, DEEP_GEMM_90, DEEP_GEMM_100], ids=str)
def test_the_order_of_the_experts_changes_nothing(form: str, machine: Machine) -> None:
    products, experts = machine.products(), random_experts(form, form)
    rows, order = random_rows([2, 5, 1], TILED.hidden), [2, 0, 1]
    tokens, other = grouped(rows), grouped([rows[number] for number in order])
    results = applied(products, tokens, experts).split([2, 5, 1])
    expected = torch.cat([results[number] for number in order])
    assert torch.equal(applied(products, other, permuted(experts, order)), expected)


@every_form
@every_machine
@pytest.mark.parametrize("out_dtype", [bf16, torch.float32])
def test_no_rows(form: str, machine: Machine, out_dtype: torch.dtype) -> None:
    experts = random_experts(form, form)
    for plain in (grouped(random_rows([0, 0, 0], TILED.hidden)),):
        for tokens in arrivals(experts, plain):
            result = applied(machine, tokens, experts, out_dtype)
            assert (result.shape, result.dtype) == ((0, TILED.hidden), out_dtype)


@every_machine
def test_places_for_rows_and_none_of_them_taken(machine: Machine) -> None:
    experts, none = random_experts("fp8 powers", "float"), random_rows([0, 0, 0], TILED.hidden)
    for tokens in (grouped(none, behind=7), masked(none, 4)):
        result = applied(machine, tokens, experts)
        assert result.shape == (*tokens.rows.shape[:-1], TILED.hidden)


@every_form
def test_the_rows_that_were_handed_over_stay_what_they_were(form: str) -> None:
    experts = random_experts(form, form)
    for plain in layouts(random_rows(COUNTS, TILED.hidden)).values():
        for tokens in arrivals(experts, plain):
            before = tokens.rows.clone().view(torch.uint8)
            prepared = prepare_expert_weights(DEEP_GEMM_90.products(), experts)
            moe.quantized_moe_apply(DEEP_GEMM_90.products(), tokens, prepared, bf16)
            assert torch.equal(tokens.rows.view(torch.uint8), before)


@every_form
@pytest.mark.parametrize("machine", [TRITON_90, DEEP_GEMM_90], ids=str)
def test_routing_weights_where_the_experts_multiply(form: str, machine: Machine) -> None:
    experts, products = random_experts(form, form), machine.products()
    for tokens in layouts(random_rows(COUNTS, TILED.hidden)).values():
        shape = tokens.rows.shape[:-1]
        weights = torch.rand(shape, generator=torch.Generator().manual_seed(1))
        weighted = replace(
            tokens, routing_weight_side=RoutingWeightSide.EXPERTS, row_weights=weights
        )
        plain = defined(applied(products, tokens, experts, torch.float32), tokens)
        got = defined(applied(products, weighted, experts, torch.float32), tokens)
        assert torch.equal(got, plain * defined(weights.unsqueeze(-1), tokens))


def test_an_exchange_that_is_under_way_is_waited_for() -> None:
    experts, products = random_experts("fp8", "fp8"), DEEP_GEMM_90.products()
    tokens = quantised(masked(random_rows(COUNTS, TILED.hidden), 128))
    expected = defined(applied(products, tokens, experts), tokens)
    rows, scales = torch.zeros_like(tokens.rows), torch.zeros_like(tokens.scales)

    def receive() -> None:
        rows.copy_(tokens.rows)
        scales.copy_(tokens.scales)

    waiting = replace(tokens, rows=rows, scales=scales, receive=receive)
    prepared = prepare_expert_weights(products, experts)
    got = moe.quantized_moe_apply(products, waiting, prepared, bf16)
    assert torch.equal(defined(got, tokens), expected)


def test_experts_that_nobody_prepared_are_prepared_for_the_call() -> None:
    experts, products = random_experts("fp8 powers", "w4a16"), DEEP_GEMM_100.products()
    tokens = grouped(random_rows(COUNTS, TILED.hidden))
    unprepared = moe.quantized_moe_apply(products, tokens, experts, bf16)
    assert torch.equal(unprepared, applied(products, tokens, experts))


def test_scales_of_rows_may_lie_column_by_column() -> None:
    """As low-latency exchanges deliver them, slot by slot."""
    experts = random_experts("fp8", "fp8")
    for machine in (TRITON_90, DEEP_GEMM_90):
        tokens = quantised(masked(random_rows(COUNTS, TILED.hidden), 8))
        assert tokens.scales is not None
        turned = replace(tokens, scales=tokens.scales.mT.contiguous().mT)
        assert turned.scales is not None
        assert turned.scales.stride() != tokens.scales.stride()
        expected = defined(applied(machine, tokens, experts), tokens)
        assert torch.equal(defined(applied(machine, turned, experts), tokens), expected)


def test_float8_rows_never_meet_experts_that_cannot_multiply_them() -> None:
    tokens = quantised(grouped(random_rows(COUNTS, TILED.hidden)))
    for form in ("float", "w4a16"):
        experts = random_experts(form, "fp8")
        with pytest.raises(ContractError, match=f"layer {LAYER}: fp8 rows met"):
            applied(TRITON_90, tokens, experts)


def test_float32_rows_never_meet_quantised_experts() -> None:
    tokens = grouped(random_rows(COUNTS, TILED.hidden, dtype=torch.float32))
    for form in ("fp8", "w4a16"):
        experts = random_experts(form, form)
        with pytest.raises(ContractError, match=f"layer {LAYER}: fp32 rows met"):
            applied(TRITON_90, tokens, experts)


def test_figures_choose_by_the_rows_of_the_call() -> None:
    """Both ways of one prepared layer are used, and each gives what the reference gives."""
    from plugins.cuda_common.tests.test_cuda_common_choice import measured

    table = (measured("H100", (128, 1, 1, 2), (128, 100, 2, 1)),)
    products = Products(Machine(SM90).products().runtime, measurements=table)
    experts = prepare_expert_weights(products, random_experts("fp8", "fp8"))
    assert isinstance(experts.prepared, PreparedExperts)
    for counts, way in (([2, 0, 1], "Fp8DeepGemmProduct"), ([90, 60, 80], "Fp8TritonProduct")):
        tokens = grouped(random_rows(counts, TILED.hidden))
        groups = moe.Groups.of(tokens)
        chosen = (experts.prepared.w13.for_rows(groups), experts.prepared.w2.for_rows(groups))
        assert [type(one).__name__ for one in chosen] == [way, way]
        got = moe.quantized_moe_apply(products, tokens, experts, bf16)
        assert ball_of(tokens, experts).holds(defined(got, tokens))


def test_models_of_one_process_do_not_touch_each_other() -> None:
    """A quantised model and a draft that is not, on two chips, in turns."""
    main = DEEP_GEMM_90.products(), random_experts("fp8", "w4a16")
    draft = Machine(SM100).products(), random_experts("float", "float", seed=9)
    tokens = grouped(random_rows(COUNTS, TILED.hidden))
    alone = [applied(products, tokens, experts) for products, experts in (main, draft)]
    prepared = [
        (products, prepare_expert_weights(products, experts)) for products, experts in (draft, main)
    ]
    for _ in range(2):
        for (products, experts), expected in zip(prepared, reversed(alone), strict=True):
            got = moe.quantized_moe_apply(products, tokens, experts, bf16)
            assert torch.equal(got, expected)
