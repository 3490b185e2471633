"""Each grouped product is what its scheme defines, to the last documented rounding."""

from __future__ import annotations

from dataclasses import astuple, replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from plugins.npu_ascend.tests.balls import Ball, Chip, Integers, product
from plugins.npu_ascend.tests.experts import FORMS, of_expert, on, serves
from tests.fixtures.scheme_storages import random_weight

from mortise.formats.integer import pack_int4, quantise_int_rows
from mortise_npu_ascend.dispatch import Generation
from mortise_npu_ascend.groups import Groups
from mortise_npu_ascend.products.base import Kind, Rows
from mortise_npu_ascend.products.select import grouped_product

if TYPE_CHECKING:
    from mortise.plugin import StoredWeight

CHIPS = [Chip(generation, strict) for generation in Generation for strict in (False, True)]
SERVED = [(form, chip) for form in FORMS for chip in CHIPS if serves(chip, form)]
COUNTS = [3, 0, 6]
# (K, N): whole tiles; groups of columns that are padded; more columns than the operators group.
SIZES = [(128, 64), (96, 192), (768, 64)]


def stored_experts(form: str, columns: int, rows: int) -> StoredWeight:
    return random_weight(
        FORMS[form],
        rows,
        columns,
        num_parts=2,
        leading=(len(COUNTS),),
        seed=columns,
        float_dtype=torch.bfloat16,
    )


def rows_of(kind: Kind, columns: int) -> tuple[Rows, list[Ball | Integers]]:
    """Rows as a product takes them, and as the judge does, expert by expert."""
    plain = torch.randn(sum(COUNTS), columns, generator=torch.Generator().manual_seed(2))
    if kind is Kind.PLAIN:
        plain = plain.to(torch.bfloat16)
        return Rows(plain, are_borrowed=True), [Ball.exactly(part) for part in plain.split(COUNTS)]
    values, scales = quantise_int_rows(plain, 4 if kind is Kind.INT4 else 8)
    parts = zip(values.split(COUNTS), scales.split(COUNTS), strict=True)
    packed = pack_int4(values) if kind is Kind.INT4 else values
    return Rows(packed, scales, are_borrowed=True), [Integers.arrived(*part) for part in parts]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(("form", "chip"), SERVED, ids=str)
def test_it_is_the_product_of_the_stored_numbers(
    form: str, chip: Chip, size: tuple[int, int]
) -> None:
    stored = stored_experts(form, *size)
    laid_out = grouped_product(on(chip), stored)
    rows, taken = rows_of(laid_out.takes, size[0])
    got = laid_out.multiply(rows, Groups(torch.tensor(COUNTS)))
    assert got.dtype is torch.bfloat16
    shares = [of_expert(stored, number) for number in range(len(COUNTS))]
    balls = [product(part, share, chip) for part, share in zip(taken, shares, strict=True)]
    ball = Ball(*(np.concatenate(parts) for parts in zip(*map(astuple, balls), strict=True)))
    assert not len(ball.misses(got))
    off = got.double().numpy() - ball.center
    assert (off**2).mean() <= (ball.spread**2).mean()


@pytest.mark.parametrize(("form", "chip"), SERVED, ids=str)
def test_the_judge_is_strict(form: str, chip: Chip) -> None:
    """Where nothing but the last rounding is allowed, the balls are about as small as that."""
    stored = of_expert(stored_experts(form, 128, 64), 0)
    _, taken = rows_of(grouped_product(on(chip), stored_experts(form, 128, 64)).takes, 128)
    ball = product(taken[2], stored, chip)
    relative = np.sqrt((ball.spread**2).mean() / (ball.center**2).mean())
    is_rescaled = form == "w4a8 grouped" and chip.generation is Generation.A5
    assert relative < (0.03 if is_rescaled else 0.01)


@pytest.mark.parametrize("form", ["w4a4", "w4a4 grouped", "w4a8", "w4a8 grouped"])
def test_large_scales_do_not_overflow_the_sums_in_fp16(form: str) -> None:
    """Scales of the weights that take the fp16 sums past 65504, with rows that are small."""
    chip = Chip(Generation.A2)
    stored = stored_experts(form, 128, 64)
    assert stored.scale is not None
    large = replace(stored, scale=stored.scale * 2.0**17)
    plain, huge = (grouped_product(on(chip), one) for one in (stored, large))
    rows, _ = rows_of(plain.takes, 128)
    assert rows.scales is not None
    small = replace(rows, scales=rows.scales * 2.0**-17)
    groups = Groups(torch.tensor(COUNTS))
    expected = plain.multiply(rows, groups)
    got = huge.multiply(small, groups)
    assert got.isfinite().all()
    assert torch.equal(got, expected)
