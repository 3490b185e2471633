"""Each grouped product is what its scheme defines, and holds what is stored only once."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from plugins.cuda_common.tests import fp8_balls as balls
from plugins.cuda_common.tests.expert_cases import (
    FORMS,
    LAYER,
    MACHINES,
    SM90,
    SM100,
    TILED,
    Machine,
    Sizes,
    grouped,
    joined,
    of_expert,
    random_experts,
    random_experts_weight,
    random_rows,
    runtime_of,
)

from mortise.errors import BackendUnusableError, ContractError
from mortise.plugin import ReasonCode, ScaleFormat, StoredWeight, WeightScheme
from mortise_cuda_common import moe
from mortise_cuda_common.experts import PreparedExperts, prepare_expert_weights
from mortise_cuda_common.groups import Groups
from mortise_cuda_common.products.chosen import ChosenProduct
from mortise_cuda_common.products.deep_gemm import expected_rows
from mortise_cuda_common.products.exact import ExactProduct
from mortise_cuda_common.products.fp8_deep_gemm import Fp8DeepGemmProduct
from mortise_cuda_common.products.fp8_triton import Fp8TritonProduct
from mortise_cuda_common.products.int4 import Int4Product
from mortise_cuda_common.products.plain import PlainProduct
from mortise_cuda_common.products.plain_deep_gemm import PlainDeepGemmProduct
from mortise_cuda_common.products.select import Products
from mortise_cuda_common.rows import Kind

COUNTS = [3, 0, 6]
bf16 = torch.bfloat16
every_form = pytest.mark.parametrize("form", FORMS)

# Weights that are quantised again are judged by the tests of the experts.
STORED = [
    (form, machine)
    for form in FORMS
    for machine in MACHINES
    if (form, machine) != ("fp8", Machine(SM100, "deep_gemm"))
]


@pytest.mark.parametrize("out_dtype", [bf16, torch.float32])
@pytest.mark.parametrize(("form", "machine"), STORED, ids=str)
def test_it_is_the_product_of_the_stored_numbers(
    form: str, machine: Machine, out_dtype: torch.dtype
) -> None:
    stored = random_experts_weight(form, 256, 384, 2)
    tokens = grouped(random_rows(COUNTS, 384), alignment=128)
    groups = Groups.of(tokens)
    product = machine.products().of(stored)
    rows = product.quantise(tokens.rows, groups)
    assert rows.kind is product.takes
    got = product.multiply(rows, groups, out_dtype)
    assert (got.dtype, got.shape) == (out_dtype, (len(tokens.rows), 256))
    parts = []
    for number, plain in enumerate(random_rows(COUNTS, 384)):
        share = of_expert(stored, number)
        if len(plain):
            parts.append(balls.product(balls.taken(balls.Ball.exactly(plain), share), share))
    ball = joined(parts)
    is_rounded = out_dtype is bf16 or isinstance(product, Fp8DeepGemmProduct | PlainDeepGemmProduct)
    ball = ball.rounded(balls.BF16) if is_rounded else ball.rounded(balls.FP32)
    firsts = groups.first_rows.tolist()
    own = [first + row for first, count in zip(firsts, COUNTS, strict=True) for row in range(count)]
    assert ball.holds(got[own])
    relative = np.sqrt((ball.spread**2).mean() / (ball.center**2).mean())
    # Half of it is the last rounding, the rest float8 values that were halfway between two.
    assert relative < 0.01, "the judge is strict"


@pytest.mark.parametrize(
    ("form", "machine", "kind"),
    [
        ("float", Machine(SM90), PlainProduct),
        ("float", Machine(SM90, "deep_gemm"), PlainDeepGemmProduct),
        ("fp8", Machine(SM90), ChosenProduct),
        ("fp8", Machine(SM90, "triton"), Fp8TritonProduct),
        ("fp8", Machine(SM90, deep_gemm=False), Fp8TritonProduct),
        ("fp8", Machine(SM90, "deep_gemm"), Fp8DeepGemmProduct),
        # Exactly what is stored, rather than what the faster library would make of it.
        ("fp8", Machine(SM100), Fp8TritonProduct),
        ("fp8 powers", Machine(SM100), ChosenProduct),
        ("fp8", Machine(SM100, "deep_gemm"), Fp8DeepGemmProduct),
        ("w4a16", Machine(SM90, "deep_gemm"), Int4Product),
    ],
    ids=str,
)
def test_what_multiplies(form: str, machine: Machine, kind: type) -> None:
    assert type(machine.products().of(random_experts_weight(form, 256, 128))) is kind


def test_float32_weights_are_multiplied_exactly_whatever_the_runner() -> None:
    stored = random_experts_weight("float", 64, 64, dtype=torch.float32)
    for machine in MACHINES:
        product = machine.products().of(stored)
        assert isinstance(product, ExactProduct)
        assert product.weight.data_ptr() == stored.weight.data_ptr()


@every_form
@pytest.mark.parametrize("machine", [Machine(SM90), Machine(SM90, "deep_gemm")], ids=str)
def test_nothing_that_is_stored_is_held_twice(form: str, machine: Machine) -> None:
    stored = random_experts_weight(form, 256, 128)
    product = machine.products().of(stored)
    ways = (product.deep_gemm, product.triton) if isinstance(product, ChosenProduct) else (product,)
    for way in ways:
        weight = way.words if isinstance(way, Int4Product) else way.weight
        assert weight.data_ptr() == stored.weight.data_ptr()
        if stored.scale is not None:
            assert way.scale.data_ptr() == stored.scale.data_ptr()


@pytest.mark.parametrize(("form", "kind"), [("fp8", Kind.FP8), ("fp8 powers", Kind.FP8_UE8M0)])
def test_scales_of_rows_are_powers_of_two_where_those_of_the_weight_are(
    form: str, kind: Kind
) -> None:
    stored = random_experts_weight(form, 256, 128)
    for machine in (Machine(SM90), Machine(SM90, "deep_gemm"), Machine(SM100, "triton")):
        assert machine.products().of(stored).takes is kind


@every_form
@pytest.mark.parametrize("machine", MACHINES, ids=str)
def test_preparing_again_gives_the_same_and_after_a_reload_the_new(
    form: str, machine: Machine
) -> None:
    products, tokens = machine.products(), grouped(random_rows(COUNTS, TILED.hidden))
    experts, other = random_experts(form, form), random_experts(form, form, seed=7)
    first = prepare_expert_weights(products, experts)
    before = moe.quantized_moe_apply(products, tokens, first, bf16)
    again = prepare_expert_weights(products, first)
    assert torch.equal(moe.quantized_moe_apply(products, tokens, again, bf16), before)
    for old, new in ((experts.w13, other.w13), (experts.w2, other.w2)):
        old.weight.copy_(new.weight)
        if old.scale is not None and new.scale is not None:
            old.scale.copy_(new.scale)
    reloaded = prepare_expert_weights(products, again)
    got = moe.quantized_moe_apply(products, tokens, reloaded, bf16)
    fresh = prepare_expert_weights(products, other)
    assert torch.equal(got, moe.quantized_moe_apply(products, tokens, fresh, bf16))
    assert not torch.equal(got, before)


def test_a_weight_that_is_no_dense_tensor_is_laid_out() -> None:
    stored = random_experts_weight("fp8", 256, 128)
    assert stored.scale is not None
    spread = replace(
        stored,
        weight=stored.weight.view(torch.uint8).mT.contiguous().mT.view(stored.weight.dtype),
        scale=stored.scale.mT.contiguous().mT,
    )
    tokens = grouped(random_rows(COUNTS, 128), alignment=128)
    for machine in (Machine(SM90, "triton"), Machine(SM90, "deep_gemm")):
        results = []
        for one in (stored, spread):
            product, groups = machine.products().of(one), Groups.of(tokens)
            results.append(
                product.multiply(product.quantise(tokens.rows, groups), groups, bf16)[:3]
            )
        assert torch.equal(*results)


def test_a_projection_that_nothing_multiplies_is_refused_by_its_name() -> None:
    experts = random_experts("fp8", "fp8")
    stored = StoredWeight(
        scheme=WeightScheme.W8A8,
        weight=torch.zeros(3, 256, 128, dtype=torch.int8),
        scale=torch.ones(3, 256, 1),
    )
    with pytest.raises(
        BackendUnusableError, match=f"layer {LAYER}: w2: its weight is stored as w8a8"
    ) as caught:
        prepare_expert_weights(Machine(SM90).products(), replace(experts, w2=stored))
    assert caught.value.reason is ReasonCode.REQUEST_UNSUPPORTED
    small = random_experts("fp8", "fp8", Sizes(intermediate=72))
    with pytest.raises(BackendUnusableError, match=r"w13: runner is deep_gemm, and .* 144 rows"):
        prepare_expert_weights(Machine(SM90, "deep_gemm").products(), small)


def test_scales_that_are_said_to_be_powers_of_two_and_are_none_are_refused() -> None:
    stored = replace(random_experts_weight("fp8", 256, 128), scale_format=ScaleFormat.UE8M0)
    with pytest.raises(ContractError, match="no powers of two"):
        Machine(SM100, "deep_gemm").products().of(stored)


def test_rows_that_an_expert_is_expected_to_have() -> None:
    counts = torch.tensor([3, 5, 0], dtype=torch.int32)
    groups = Groups(
        first_rows=torch.tensor([0, 128, 256]), counts=counts, num_rows=384, capacity=128
    )
    assert expected_rows(groups) == 64, "slots are sized for the worst case"
    assert expected_rows(replace(groups, capacity=8)) == 8
    assert expected_rows(replace(groups, host_counts=(3, 5, 0))) == 3
    assert expected_rows(replace(groups, host_counts=(0, 0, 0))) == 1


def test_the_alignment_that_rows_are_best_sent_with() -> None:
    assert Products(runtime_of(SM90)).alignment == 128
    assert Products(runtime_of(SM90), "triton").alignment == 1
    assert Products(runtime_of(SM90, deep_gemm=False)).alignment == 1


def test_prepared_experts_are_two_products() -> None:
    prepared = prepare_expert_weights(Machine(SM90).products(), random_experts("float", "w4a16"))
    assert isinstance(prepared.prepared, PreparedExperts)
    assert isinstance(prepared.prepared.w13, PlainProduct)
    assert isinstance(prepared.prepared.w2, Int4Product)
