"""Tolerances follow from roundings: more of them allow more, and mistakes are always more."""

from __future__ import annotations

import pytest
import torch

from mortise.conformance import tolerances
from mortise.conformance.comparison import relative_errors, same_bytes
from mortise.plugin import IndexKeyDtype, WeightScheme


def test_every_scheme_has_its_entries() -> None:
    assert set(tolerances.STEP) == set(tolerances.WEIGHT_ROUNDINGS) == set(WeightScheme)


@pytest.mark.parametrize("scheme", WeightScheme)
def test_bfloat16_is_allowed_more_than_float32(scheme: WeightScheme) -> None:
    wide, narrow = (
        tolerances.of_experts(scheme, scheme, dtype, 256, 128, 16)
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert wide.whole < narrow.whole
    assert narrow.whole < narrow.row < 0.5, "half of a row may not be missed"


def test_a_quantised_input_is_allowed_its_steps() -> None:
    plain, int8, int4 = (
        tolerances.of_projection(scheme, torch.bfloat16, 256, 16).whole
        for scheme in (WeightScheme.FLOAT, WeightScheme.W8A8, WeightScheme.W4A4)
    )
    assert plain < int8 < int4


def test_a_weight_alone_has_no_steps() -> None:
    static = tolerances.step_of(WeightScheme.NVFP4, static_input=True)
    assert static > tolerances.step_of(WeightScheme.NVFP4, static_input=False) == 0


def test_queries_for_float8_keys_may_be_rounded() -> None:
    exact = tolerances.of_scores(IndexKeyDtype.COMPUTE, torch.bfloat16, 8, 32)
    rounded = tolerances.of_scores(IndexKeyDtype.FP8_E4M3, torch.bfloat16, 8, 32)
    assert exact.whole < 1e-4 < rounded.whole < 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_roundings_of_real_products_are_within(dtype: torch.dtype) -> None:
    """torch's own products in that dtype, against float64."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(64, 256, generator=generator).to(dtype)
    weight = (torch.randn(128, 256, generator=generator) / 16).to(dtype)
    whole, each = relative_errors(rows @ weight.T, rows.double() @ weight.double().T)
    allowed = tolerances.of_projection(WeightScheme.FLOAT, dtype, 256, 64)
    assert whole < allowed.whole
    assert float(each.max()) < allowed.row


def test_what_is_not_a_number_is_infinitely_far_off() -> None:
    found, expected = torch.ones(2, 3), torch.ones(2, 3)
    found[1, 2] = torch.nan
    whole, rows = relative_errors(found, expected)
    assert whole == float("inf")
    assert rows.tolist() == [0.0, float("inf")]


def test_not_a_number_is_the_same_bytes() -> None:
    one = torch.tensor([1.0, torch.nan])
    assert same_bytes(one, one.clone())
    assert not same_bytes(torch.tensor([0.0]), torch.tensor([-0.0]))
