"""What the usual mistakes do to results is more than any tolerance allows, in every scheme."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mortise.conformance.comparison import is_within
from mortise.conformance.draws import draw_rows
from mortise.conformance.expert_cases import (
    USUAL_COUNTS,
    ExpertCase,
    draw_tokens,
    layer_of,
    layers,
)
from mortise.conformance.indexer_cases import IndexCase, draw_launch, launches, visible
from mortise.conformance.indexer_checks import changed_launches, expected_scores
from mortise.conformance.linear_checks import LinearCase, projection_of, projections
from mortise.conformance.subject import Subject
from mortise.conformance.what_if import changed_experts, changed_weights
from mortise.testing.poison import defined_rows

REFERENCE = Subject("reference")
CAPABILITIES = REFERENCE.capabilities


@pytest.mark.parametrize("case", list(layers(CAPABILITIES)), ids=str)
def test_mistakes_in_experts_are_seen(case: ExpertCase) -> None:
    layer = layer_of(REFERENCE, case)
    tokens = draw_tokens(USUAL_COUNTS, case.hidden, case.dtype, layer.arrivals[0].format)
    expected = layer.expected(REFERENCE, tokens)
    tolerance = case.tolerance(len(expected))
    assert is_within(expected, expected, tolerance)
    for text, changed in changed_experts(layer.stored):
        again = REFERENCE.reference.prepare_expert_weights(changed, layer.arrivals[0])
        found = REFERENCE.reference.quantized_moe_apply(tokens, again, case.dtype)
        assert not is_within(found[defined_rows(tokens)], expected, tolerance), text


@pytest.mark.parametrize("case", list(projections(CAPABILITIES)), ids=str)
def test_mistakes_in_projections_are_seen(case: LinearCase) -> None:
    one = projection_of(REFERENCE, case)
    rows = draw_rows(5, case.in_features, case.dtype)
    expected = one.expected(REFERENCE, rows)
    for text, changed in changed_weights(one.stored.stored):
        wrong = replace(one.stored, stored=changed)
        found = REFERENCE.reference.quantized_linear(rows, wrong, case.dtype)
        assert not is_within(found, expected, case.tolerance(5)), text


@pytest.mark.parametrize("case", list(launches(CAPABILITIES)), ids=str)
def test_mistakes_in_scores_are_seen(case: IndexCase) -> None:
    launch = draw_launch(case)
    expected = visible(expected_scores(REFERENCE, case, launch), launch.lens)
    for text, changed in changed_launches(launch):
        found = visible(expected_scores(REFERENCE, case, changed), launch.lens)
        assert not is_within(found, expected, case.tolerance), text
