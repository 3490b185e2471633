"""The sums judged by exact arithmetic, and by numbers of which plain addition loses all but one."""

from __future__ import annotations

import pytest
import torch

from mortise_toy.product import blocks_of, compensated_product

UNIT = 2.0**-24


@pytest.mark.parametrize("columns", [1, 7, 64, 1000])
@pytest.mark.parametrize("shape", [(5, 640, 3), (1, 1, 1), (0, 100, 4)], ids=str)
def test_the_error_keeps_to_its_bound(shape: tuple[int, int, int], columns: int) -> None:
    num_rows, inner, outer = shape
    generator = torch.Generator().manual_seed(inner)
    rows = torch.randn(num_rows, inner, generator=generator)
    weight = torch.randn(outer, inner, generator=generator)
    found = compensated_product(rows, blocks_of(weight, columns))
    # Products of two float32 numbers are exact in float64, and its own roundings too small to see.
    exact = rows.double() @ weight.double().T
    magnitude = rows.double().abs() @ weight.double().abs().T
    assert found.dtype is torch.float32
    assert ((found.double() - exact).abs() <= (columns + 3) * UNIT * magnitude).all()


def test_what_one_rounding_loses_the_next_addition_gets() -> None:
    inner = 4097
    rows = torch.full((1, inner), 2.0**-24)
    rows[0, 0] = 1.0
    weight = torch.ones(1, inner)
    plain = torch.zeros(())
    for number in rows[0]:
        plain = plain + number  # each of the small numbers is rounded away
    assert plain == 1.0
    assert compensated_product(rows, blocks_of(weight, 1)).item() == 1.0 + 4096 * 2.0**-24
