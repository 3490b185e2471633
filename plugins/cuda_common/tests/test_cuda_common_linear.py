"""Quantised projections outside the experts give what their schemes define."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from plugins.cuda_common.tests import fp8_balls as balls
from plugins.cuda_common.tests.expert_cases import FORMS, MACHINES, SM90, SM100, Machine, calc_diff
from tests.fixtures.scheme_storages import Storage, random_weight

from mortise.errors import BackendUnusableError, ContractError
from mortise.plugin import LinearWeight, StoredWeight, WeightScheme
from mortise.reference import projections as reference
from mortise_cuda_common.linear import PreparedLinear, prepare_linear_weight, quantized_linear
from mortise_cuda_common.products.fp8_deep_gemm import Fp8DeepGemmProduct
from mortise_cuda_common.products.fp8_triton import Fp8TritonProduct

LAYER = "model.layers.0.self_attn.o_proj"
N, K, PARTS = 256, 256, 2
QUANTISED = sorted(set(FORMS) - {"float"})
bf16 = torch.bfloat16

every_machine = pytest.mark.parametrize("machine", MACHINES, ids=str)
every_form = pytest.mark.parametrize("form", QUANTISED)


def linear_of(stored: StoredWeight, bias: torch.Tensor | None = None) -> LinearWeight:
    packed = 8 if stored.weight.dtype is torch.int32 else 1
    return LinearWeight(
        layer=LAYER,
        stored=stored,
        bias=bias,
        out_features=stored.weight.shape[0],
        in_features=stored.weight.shape[1] * packed,
    )


def random(form: str, rows: int = N, columns: int = K, seed: int = 0) -> StoredWeight:
    return random_weight(FORMS[form], rows, columns, num_parts=PARTS, seed=seed)


def normal(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(bf16)


def applied(
    machine: Machine, rows: torch.Tensor, linear: LinearWeight, out_dtype: torch.dtype = bf16
) -> torch.Tensor:
    products = machine.products()
    prepared = prepare_linear_weight(products, linear)
    return quantized_linear(products, rows, prepared, out_dtype)


def ball_of(rows: torch.Tensor, linear: LinearWeight, *, is_rounded_twice: bool) -> balls.Ball:
    ball = balls.product(balls.taken(balls.Ball.exactly(rows), linear.stored), linear.stored)
    if linear.bias is None:
        return ball.rounded(balls.BF16)
    if is_rounded_twice:
        ball = ball.rounded(balls.BF16)
    with_bias = replace(ball, center=ball.center + linear.bias.double().numpy())
    return with_bias.rounded(balls.BF16)


def rounds_twice(machine: Machine, form: str) -> bool:
    """DeepGEMM gives bfloat16, and the bias is added to that."""
    products = machine.products()
    prepared = prepare_linear_weight(products, linear_of(random(form))).prepared
    assert isinstance(prepared, PreparedLinear)
    return isinstance(prepared.product, Fp8DeepGemmProduct)


@every_machine
@every_form
@pytest.mark.parametrize("with_bias", [False, True])
def test_every_scheme(form: str, machine: Machine, with_bias: bool) -> None:
    linear = linear_of(random(form), normal(N, seed=8) if with_bias else None)
    rows = normal(5, K)
    got = applied(machine, rows, linear)
    expected = reference.quantized_linear(rows, linear, bf16)
    assert (got.shape, got.dtype) == ((5, N), bf16)
    if form == "fp8" and machine == Machine(SM100, "deep_gemm"):
        # The weight was quantised again: a square of 2**-10 on average, of which half is measured.
        assert calc_diff(got, expected) < 2.0**-10 + 2.0**-11
        return
    ball = ball_of(rows, linear, is_rounded_twice=rounds_twice(machine, form))
    assert ball.holds(got)
    assert ball.holds(expected)
    assert calc_diff(got, expected) < 1e-3


@every_form
@pytest.mark.parametrize("machine", [Machine(SM90, "triton"), Machine(SM100)], ids=str)
def test_where_nothing_is_rounded_differently_the_bits_are_the_references(
    form: str, machine: Machine
) -> None:
    """But for sums in another order, which can move a result by its last bit."""
    linear = linear_of(random(form))
    rows = normal(9, K)
    got = applied(machine, rows, linear)
    expected = reference.quantized_linear(rows, linear, bf16)
    assert (got != expected).float().mean() < 0.02
    torch.testing.assert_close(got, expected, rtol=2.0**-7, atol=2.0**-16)


@every_machine
@every_form
def test_no_rows_and_rows_that_are_not_contiguous(form: str, machine: Machine) -> None:
    products, linear = machine.products(), linear_of(random(form), normal(N))
    prepared = prepare_linear_weight(products, linear)
    none = quantized_linear(products, normal(0, K), prepared, torch.float32)
    assert (none.shape, none.dtype) == ((0, N), torch.float32)
    wide = normal(6, 2 * K)
    expected = quantized_linear(products, wide[:, ::2].contiguous(), prepared, bf16)
    assert torch.equal(quantized_linear(products, wide[:, ::2], prepared, bf16), expected)
    assert torch.equal(quantized_linear(products, wide[:, ::2], linear, bf16), expected)


@every_machine
@every_form
def test_a_row_does_not_depend_on_its_neighbours(form: str, machine: Machine) -> None:
    products = machine.products()
    prepared = prepare_linear_weight(products, linear_of(random(form)))
    rows = normal(6, K)
    together = quantized_linear(products, rows, prepared, bf16)
    for number in range(6):
        alone = quantized_linear(products, rows[number : number + 1], prepared, bf16)
        assert torch.equal(together[number : number + 1], alone)


@pytest.mark.parametrize("shape", [(40, 72), (264, 200), (8, 1024)], ids=str)
@pytest.mark.parametrize("form", ["fp8", "w4a16"])
def test_shapes_that_no_tile_divides(form: str, shape: tuple[int, int]) -> None:
    linear = linear_of(random_weight(FORMS[form], *shape))
    rows = normal(3, shape[1])
    for machine in (Machine(SM90), Machine(SM100)):
        got = applied(machine, rows, linear)
        assert ball_of(rows, linear, is_rounded_twice=False).holds(got)


@every_form
@every_machine
def test_preparing_again_gives_the_same_and_after_a_reload_the_new(
    form: str, machine: Machine
) -> None:
    products = machine.products()
    linear, other = linear_of(random(form)), random(form, seed=4)
    rows = normal(4, K)
    first = prepare_linear_weight(products, linear)
    before = quantized_linear(products, rows, first, bf16)
    assert torch.equal(applied(machine, rows, first), before)
    linear.stored.weight.copy_(other.weight)
    assert linear.stored.scale is not None
    assert other.scale is not None
    linear.stored.scale.copy_(other.scale)
    assert torch.equal(applied(machine, rows, first), applied(machine, rows, linear_of(other)))


def test_what_multiplies() -> None:
    """Every published figure of single products calls DeepGEMM faster, so it is the first."""
    for form, machine, kind in (
        ("fp8", Machine(SM90), Fp8DeepGemmProduct),
        ("fp8 powers", Machine(SM100), Fp8DeepGemmProduct),
        ("fp8", Machine(SM100), Fp8TritonProduct),
        ("fp8", Machine(SM90, deep_gemm=False), Fp8TritonProduct),
    ):
        prepared = prepare_linear_weight(machine.products(), linear_of(random(form))).prepared
        assert isinstance(prepared, PreparedLinear)
        assert type(prepared.product) is kind
        assert prepared.product.weight.shape == (1, N, K)


def test_unquantised_weights_are_plain_torch() -> None:
    weight = random_weight(Storage(WeightScheme.FLOAT), 6, 4)
    linear = linear_of(weight, torch.ones(6))
    products, rows = Machine(SM90).products(), torch.ones(2, 4)
    assert prepare_linear_weight(products, linear) is linear
    expected = torch.nn.functional.linear(rows, weight.weight, torch.ones(6))
    assert torch.equal(quantized_linear(products, rows, linear, torch.float32), expected)


@pytest.mark.parametrize(
    ("rows", "what"),
    [
        (torch.zeros(2, K), "torch.float32 rows met fp8_block weights"),
        (torch.zeros(2, K, dtype=torch.float8_e4m3fn), "torch.float8_e4m3fn rows met fp8_block"),
        (torch.zeros(2, K + 1, dtype=bf16), r"rows of shape \(2, 257\) met a projection of 256"),
        (torch.zeros(1, 2, K, dtype=bf16), r"rows of shape \(1, 2, 256\) met a projection"),
    ],
)
def test_rows_that_it_cannot_multiply(rows: torch.Tensor, what: str) -> None:
    with pytest.raises(ContractError, match=f"layer {LAYER}: {what}"):
        applied(Machine(SM90), rows, linear_of(random("fp8")))


def test_what_was_said_to_be_unserved_is_refused_by_name_when_it_comes() -> None:
    linear = linear_of(random_weight(Storage(WeightScheme.W4A8), N, K))
    with pytest.raises(BackendUnusableError, match=f"layer {LAYER}: its weight is stored as w4a8"):
        prepare_linear_weight(Machine(SM90).products(), linear)
