"""Two models' predictions are compared as torch and the definitions do it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from mortise.evaluation import divergence as module
from mortise.evaluation.divergence import divergence


def random_logits(seed: int, rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 4


@given(seed=st.integers(0, 999), rows=st.integers(1, 9), columns=st.integers(2, 40))
def test_divergence_and_likelihoods_are_torchs(seed: int, rows: int, columns: int) -> None:
    reference, other = random_logits(seed, rows, columns), random_logits(seed + 1, rows, columns)
    ids = [(seed + row) % columns for row in range(rows)]

    found = divergence(reference, other, ids)

    expected, compared = (logits.double().log_softmax(-1) for logits in (reference, other))
    kl = functional.kl_div(compared, expected, reduction="sum", log_target=True)
    assert found.divergence_nats == pytest.approx(float(kl), rel=1e-12)
    wanted = torch.tensor(ids)
    for logits, nats in ((reference, found.reference_nats), (other, found.nats)):
        cross_entropy = functional.cross_entropy(logits.double(), wanted, reduction="sum")
        assert nats == pytest.approx(float(cross_entropy), rel=1e-12)
    # The first of the largest, as a list finds it.
    likeliest = [[row.index(max(row)) for row in model.tolist()] for model in (reference, other)]
    agreeing = sum(one == two for one, two in zip(*likeliest, strict=True))
    assert found.num_agreeing == agreeing
    assert found.num_tokens == rows


def test_it_is_the_divergence_from_the_reference_and_not_the_other_way_round() -> None:
    # KL((1/2, 1/2) || (1/4, 3/4)) = ln 2 - ln(3) / 2, and the other way 3/4 ln 3 - ln 2.
    even, uneven = torch.zeros(1, 2), torch.tensor([[1.0, 3.0]]).log()
    found = divergence(even, uneven, [0]).divergence_nats
    assert found == pytest.approx(math.log(2) - math.log(3) / 2, rel=1e-6)
    backward = divergence(uneven, even, [0]).divergence_nats
    assert backward == pytest.approx(0.75 * math.log(3) - math.log(2), rel=1e-6)


@given(seed=st.integers(0, 99), rows=st.integers(1, 30))
def test_a_model_agrees_with_itself_exactly(seed: int, rows: int) -> None:
    logits = random_logits(seed, rows, 17)
    found = divergence(logits, logits.clone(), [0] * rows)
    assert found.divergence_nats == 0.0
    assert found.num_agreeing == rows
    assert found.nats == found.reference_nats


def test_a_difference_in_the_last_bit_is_seen() -> None:
    logits = random_logits(0, 64, 50)
    moved = torch.nextafter(logits, logits + 1)
    found = divergence(logits, moved, [0] * 64).divergence_nats
    # In single precision the rounding of the sums alone is some 1e-7 for each place.
    assert 0 < found < 1e-11


def test_a_constant_added_to_all_logits_changes_nothing() -> None:
    logits = random_logits(0, 5, 9)
    shifted = divergence(logits, logits + 8, [0] * 5)
    assert shifted.divergence_nats == pytest.approx(0, abs=1e-10)
    assert shifted.num_agreeing == 5


def test_what_the_reference_rules_out_costs_nothing_and_what_the_other_does_everything() -> None:
    open_, closed = torch.zeros(1, 3), torch.tensor([[0.0, 0.0, -math.inf]])
    assert divergence(closed, open_, [0]).divergence_nats == pytest.approx(math.log(1.5))
    assert divergence(closed, closed, [0]).divergence_nats == 0.0
    assert divergence(open_, closed, [0]).divergence_nats == math.inf


def test_a_model_that_breaks_is_not_called_good() -> None:
    broken = torch.full((2, 3), math.nan)
    found = divergence(torch.zeros(2, 3), broken, [0, 1])
    assert math.isnan(found.divergence_nats)
    assert math.isnan(found.nats)


def test_a_window_larger_than_what_is_held_at_once_gives_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reference, other = random_logits(1, 23, 11), random_logits(2, 23, 11)
    whole = divergence(reference, other, [3] * 23)
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 50)
    pieces = divergence(reference, other, [3] * 23)
    assert pieces.num_agreeing == whole.num_agreeing
    assert pieces.divergence_nats == pytest.approx(whole.divergence_nats, rel=1e-13)
    assert pieces.nats == pytest.approx(whole.nats, rel=1e-13)
