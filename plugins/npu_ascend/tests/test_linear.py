"""Quantised projections outside the experts give what their schemes define."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from plugins.npu_ascend.tests.balls import Ball, Chip, product
from plugins.npu_ascend.tests.experts import FORMS, on, serves
from tests.fixtures import scheme_definitions as definitions
from tests.fixtures.scheme_storages import Storage, random_weight

from mortise.errors import BackendUnusableError, ContractError
from mortise.plugin import LinearWeight, StoredWeight, WeightScheme
from mortise.reference import projections as reference
from mortise_npu_ascend.dispatch import Generation
from mortise_npu_ascend.linear import PreparedLinear, prepare_linear_weight, quantized_linear
from mortise_npu_ascend.linears.pieces import PIECE_ROWS, pieces
from mortise_npu_ascend.linears.static_int8 import integer_bias

if TYPE_CHECKING:
    from mortise_npu_ascend.vendor import Vendor

LAYER = "model.layers.0.self_attn.o_proj"
N, K, PARTS = 160, 96, 2
CHIPS = [Chip(generation, strict) for generation in Generation for strict in (False, True)]
STATIC = {
    "w8a8 static": Storage(WeightScheme.W8A8, static_input=True),
    "w8a8 static with an offset": Storage(WeightScheme.W8A8, static_input=True, asymmetric=True),
}
QUANTISED = {name: form for name, form in FORMS.items() if name != "float"} | STATIC
SERVED = [(form, chip) for form in QUANTISED for chip in CHIPS if serves(chip, form)]
bf16 = torch.bfloat16

served = pytest.mark.parametrize(("form", "chip"), SERVED, ids=str)


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
    return random_weight(QUANTISED[form], rows, columns, num_parts=PARTS, seed=seed)


def normal(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(bf16)


def applied(
    loaded: Vendor,
    rows: torch.Tensor,
    linear: LinearWeight,
    out_dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    return quantized_linear(loaded, rows, prepare_linear_weight(loaded, linear), out_dtype)


def ball_of(rows: torch.Tensor, linear: LinearWeight, chip: Chip) -> Ball:
    """The product before the bias, with the roundings of the device; static inputs have none."""
    if linear.stored.input_scale is None:
        # No grouped product of int8 here, so no scales in bfloat16.
        is_int8 = linear.stored.scheme is WeightScheme.W8A8
        chip = replace(chip, generation=Generation.A5) if is_int8 else chip
        return product(Ball.exactly(rows), linear.stored, chip)
    exact, magnitudes = definitions.product(rows, linear.stored)
    bound = definitions.rounding_bound(exact, magnitudes, rows.shape[1], bf16)
    # The device multiplies by a reciprocal: a value on the edge may fall to the other side.
    assert linear.stored.scale is not None
    steps = np.concatenate(
        [
            on_the_edge(rows, linear.stored, part) @ abs(weight).T
            for part, weight in enumerate(
                np.split(definitions.weight(linear.stored, bf16), linear.stored.num_parts)
            )
        ],
        axis=1,
    )
    return Ball(exact, bound + steps, bound + steps)


def on_the_edge(rows: torch.Tensor, stored: StoredWeight, part: int) -> np.ndarray:
    """The input's scale where its values are within a float32 rounding of two integers."""
    assert stored.input_scale is not None
    scale = stored.input_scale.double().numpy()[part]
    scaled = rows.double().numpy() / scale
    edge = abs(abs(scaled - np.floor(scaled)) - 0.5)
    return np.where(edge < 4 * 2.0**-24 * abs(scaled), scale, 0.0)


@served
@pytest.mark.parametrize("with_bias", [False, True])
def test_every_scheme(form: str, chip: Chip, with_bias: bool) -> None:
    stored = random(form)
    bias = normal(N, seed=8) if with_bias else None
    linear = linear_of(stored, bias)
    rows = normal(5, K)
    ball = ball_of(rows, linear, chip)
    if bias is not None:
        added = bias.double().numpy()
        ball = Ball(ball.center + added, ball.radius, ball.spread)
        if stored.input_scale is not None and stored.scale is not None:
            # The bias is rounded to a multiple of the product's unit.
            unit = stored.input_scale.repeat_interleave(N // PARTS) * stored.scale.squeeze(1)
            ball = ball.wider(0.5 * unit.double().numpy())
        ball = ball.rounded(2.0**-8)
    got = applied(on(chip), rows, linear)
    assert (got.shape, got.dtype) == ((5, N), bf16)
    assert not len(ball.misses(got))
    off = got.double().numpy() - ball.center
    assert (off**2).mean() <= (ball.spread**2).mean()
    assert not len(ball.misses(reference.quantized_linear(rows, linear, bf16)))


@pytest.mark.parametrize("form", ["w8a8", "w4a4", *STATIC])
@pytest.mark.parametrize("generation", [Generation.A2, Generation.A3])
def test_where_nothing_is_rounded_differently_the_bits_are_the_references(
    form: str, generation: Generation
) -> None:
    """But for the last bit of a row's scale, which can move a result by one such bit."""
    linear = linear_of(random(form))
    rows = normal(9, K)
    got = applied(on(Chip(generation)), rows, linear)
    expected = reference.quantized_linear(rows, linear, bf16)
    differs = got != expected
    assert differs.float().mean() < 0.01
    torch.testing.assert_close(got, expected, rtol=2.0**-7, atol=0)


@served
def test_no_rows_and_rows_that_are_not_contiguous(form: str, chip: Chip) -> None:
    loaded, linear = on(chip), linear_of(random(form), normal(N))
    prepared = prepare_linear_weight(loaded, linear)
    none = quantized_linear(loaded, normal(0, K), prepared, torch.float32)
    assert (none.shape, none.dtype) == ((0, N), torch.float32)
    wide = normal(6, 2 * K)
    expected = quantized_linear(loaded, wide[:, ::2].contiguous(), prepared, bf16)
    assert torch.equal(quantized_linear(loaded, wide[:, ::2], prepared, bf16), expected)
    unprepared = quantized_linear(loaded, wide[:, ::2], linear, bf16)
    assert torch.equal(unprepared, expected)


@served
def test_a_row_does_not_depend_on_its_neighbours(form: str, chip: Chip) -> None:
    loaded = on(chip)
    prepared = prepare_linear_weight(loaded, linear_of(random(form)))
    rows = normal(6, K)
    together = quantized_linear(loaded, rows, prepared, bf16)
    for number in range(6):
        alone = quantized_linear(loaded, rows[number : number + 1], prepared, bf16)
        assert torch.equal(together[number : number + 1], alone)


@pytest.mark.parametrize("form", sorted(QUANTISED))
def test_preparing_again_gives_the_same_and_after_a_reload_the_new(form: str) -> None:
    loaded = on(Chip(Generation.A2))
    linear, other = linear_of(random(form)), random(form, seed=4)
    rows = normal(4, K)
    first = prepare_linear_weight(loaded, linear)
    before = quantized_linear(loaded, rows, first, bf16)
    assert torch.equal(applied(loaded, rows, first), before)
    for name in ("weight", "scale", "input_scale", "input_offset"):
        if (tensor := getattr(linear.stored, name)) is not None:
            tensor.copy_(getattr(other, name))
    assert torch.equal(quantized_linear(loaded, rows, first, bf16), before), "until it is prepared"
    assert torch.equal(applied(loaded, rows, first), applied(loaded, rows, linear_of(other)))


@pytest.mark.parametrize("form", sorted(QUANTISED))
def test_pieces_are_the_whole(form: str) -> None:
    """Operators take at most 65535 rows of a weight; here a piece has 24."""
    loaded = on(Chip(Generation.A2))
    stored, bias = random(form), normal(N)
    cut = pieces(stored, bias, most_rows=24)
    assert [len(piece.stored.weight) for piece in cut] == (
        [24, 24, 24, 8] * 2 if "static" in form else [24] * 6 + [16]
    )
    rows = normal(3, K)
    parts = []
    for piece in cut:
        assert piece.bias is not None
        parts.append(applied(loaded, rows, linear_of(piece.stored, piece.bias)))
    assert torch.equal(torch.cat(parts, dim=1), applied(loaded, rows, linear_of(stored, bias)))


def test_parts_with_one_input_scale_are_one_product() -> None:
    stored = random("w8a8 static with an offset")
    assert len(pieces(stored, None)) == PARTS
    assert stored.input_scale is not None
    assert stored.input_offset is not None
    same = replace(
        stored,
        input_scale=stored.input_scale[:1].expand(PARTS),
        input_offset=stored.input_offset[:1].expand(PARTS),
    )
    (whole,) = pieces(same, None)
    assert len(whole.stored.weight) == N
    assert PIECE_ROWS <= 65535


def test_more_rows_than_an_operator_takes() -> None:
    loaded = on(Chip(Generation.A2))
    stored = random_weight(Storage(WeightScheme.W8A8), 65_600, 4)
    prepared = prepare_linear_weight(loaded, linear_of(stored)).prepared
    assert isinstance(prepared, PreparedLinear)
    assert len(prepared.products) == 2
    rows = normal(1, 4)
    torch.testing.assert_close(
        applied(loaded, rows, linear_of(stored)),
        reference.quantized_linear(rows, linear_of(stored), bf16),
        rtol=2.0**-7,
        atol=0,
    )


def test_the_integer_bias_undoes_the_offset() -> None:
    """As ModelSlim defines it: round(bias / scale - sum of the weights * offset)."""
    weight = torch.tensor([[1, 2, 3], [-4, 5, 127]], dtype=torch.int8)
    scale, bias = torch.tensor([0.5, 0.25]), torch.tensor([3.0, -1.1])
    got = integer_bias(weight, torch.tensor([-7.0]), scale, bias)
    assert got.dtype is torch.int32
    assert got.tolist() == [6 + 42, round(-4.4 + 896)]
    huge = integer_bias(weight, torch.tensor([0.0]), torch.tensor([1e-30, 1.0]), bias)
    assert huge.tolist() == [2**31 - 1, -1]


def test_unquantised_weights_are_plain_torch() -> None:
    weight = random_weight(Storage(WeightScheme.FLOAT), 6, 4)
    linear = linear_of(weight, torch.ones(6))
    loaded, rows = on(Chip(Generation.A2)), torch.ones(2, 4)
    assert prepare_linear_weight(loaded, linear) is linear
    expected = torch.nn.functional.linear(rows, weight.weight, torch.ones(6))
    assert torch.equal(quantized_linear(loaded, rows, linear, torch.float32), expected)


@pytest.mark.parametrize(
    ("rows", "what"),
    [
        (torch.zeros(2, K), "torch.float32 rows met w8a8 weights"),
        (torch.zeros(2, K, dtype=torch.int8), "torch.int8 rows met w8a8 weights"),
        (torch.zeros(2, K + 1, dtype=bf16), r"rows of shape \(2, 97\) met a projection of 96"),
        (torch.zeros(1, 2, K, dtype=bf16), r"rows of shape \(1, 2, 96\) met a projection"),
    ],
)
def test_rows_that_it_cannot_multiply(rows: torch.Tensor, what: str) -> None:
    with pytest.raises(ContractError, match=f"layer {LAYER}: {what}"):
        applied(on(Chip(Generation.A2)), rows, linear_of(random("w8a8")))


def test_what_was_said_to_be_unserved_is_refused_by_name_when_it_comes() -> None:
    linear = linear_of(random("w4a4"))
    with pytest.raises(BackendUnusableError, match=f"layer {LAYER}: its weight is stored as w4a4"):
        prepare_linear_weight(on(Chip(Generation.A5)), linear)
