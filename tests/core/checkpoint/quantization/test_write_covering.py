"""Patterns that name modules match those and no others."""

from __future__ import annotations

import fnmatch
import re
from itertools import product

from hypothesis import given, settings
from hypothesis import strategies as st

from mortise.checkpoint.quantization.write.covering import (
    Pattern,
    by_glob,
    by_regular_expression,
    covering,
)

LEAVES = ("q_proj", "mlp.gate", "mlp.gate_proj", "experts.0.w", "experts.1.w", "experts.10.w")
MODULES = ["lm_head", *(f"model.layers.{n}.{leaf}" for n, leaf in product((0, 1, 10), LEAVES))]


@settings(max_examples=60)
@given(names=st.sets(st.sampled_from(MODULES), min_size=1), subtrees=st.booleans())
def test_regular_expressions_match_exactly(names: set[str], subtrees: bool) -> None:
    patterns = covering(sorted(names), MODULES, by_regular_expression, subtrees=subtrees)
    found = {
        name
        for name in MODULES
        if any(re.match(pattern.regular_expression(), name) for pattern in patterns)
    }
    assert found == names


@settings(max_examples=60)
@given(names=st.sets(st.sampled_from(MODULES), min_size=1), subtrees=st.booleans())
def test_globs_match_exactly(names: set[str], subtrees: bool) -> None:
    patterns = covering(sorted(names), MODULES, by_glob, subtrees=subtrees)
    found = {
        name
        for name in MODULES
        if any(fnmatch.fnmatchcase(name, pattern.glob()) for pattern in patterns)
    }
    assert found == names


def expressions(*names: str, subtrees: bool = False) -> list[str]:
    patterns = covering(names, MODULES, by_regular_expression, subtrees=subtrees)
    return [pattern.regular_expression() for pattern in patterns]


def test_numbers_are_left_open_where_that_adds_nothing() -> None:
    gates = [f"model.layers.{n}.mlp.gate" for n in (0, 1, 10)]
    assert expressions(*gates) == [r"model\.layers\.\d+\.mlp\.gate$"]
    experts = [f"model.layers.1.experts.{n}.w" for n in (0, 1, 10)]
    assert expressions(*experts) == [r"model\.layers\.1\.experts\.\d+\.w$"]
    assert expressions(*experts[:2]) == [
        r"model\.layers\.1\.experts\.0\.w$",
        r"model\.layers\.1\.experts\.1\.w$",
    ]


def test_a_part_of_the_model_is_named_as_a_whole() -> None:
    layer = [f"model.layers.10.{leaf}" for leaf in LEAVES]
    assert expressions(*layer, "lm_head", subtrees=True) == [
        r"model\.layers\.10\..*",
        r"lm_head$",
    ]
    assert len(expressions(*layer)) == 4


def test_a_glob_that_crosses_dots_is_not_too_wide() -> None:
    modules = ["a.1.b", "a.1.c.2.b"]
    (pattern,) = covering(["a.1.b"], modules, by_glob)
    assert pattern == Pattern(("a", "1", "b"))
    assert not pattern.is_open
    (pattern,) = covering(["a.1.b"], modules, by_regular_expression)
    assert pattern.regular_expression() == r"a\.\d+\.b$"
