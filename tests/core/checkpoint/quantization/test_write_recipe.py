"""What cannot be written is refused by name, before anything is written."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest

from mortise.checkpoint.quantization.write.recipe import DIALECTS, SCHEMES, Recipe, Rule
from mortise.errors import QuantizationConfigError
from mortise.spec.weights import ScaleFormat, WeightScheme

DEFAULTS = {
    "fp8-block": "fp8",
    "w8a8": "compressed-tensors",
    "w8a8-static": "modelslim",
    "w4a8": "compressed-tensors",
    "w4a16": "compressed-tensors",
    "w4a4": "modelslim",
    "nvfp4": "compressed-tensors",
}


def test_every_scheme_has_a_dialect() -> None:
    assert {name: Recipe.of(name).dialect for name in SCHEMES if name != "float"} == DEFAULTS


@pytest.mark.parametrize(("scheme", "dialect"), list(product(DEFAULTS, DIALECTS)))
def test_pairs(scheme: str, dialect: str) -> None:
    if scheme in DIALECTS[dialect]:
        assert Recipe.of(scheme, dialect).dialect == dialect
        return
    with pytest.raises(QuantizationConfigError) as caught:
        Recipe.of(scheme, dialect)
    assert caught.value.what == f"dialect {dialect} cannot store scheme {scheme}"
    assert caught.value.expected == f"one of {', '.join(DIALECTS[dialect])} for {dialect}"


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ({"scheme": "int8"}, "scheme: 'int8' is not known"),
        ({"scheme": "float"}, "scheme: 'float' is not known"),
        ({"scheme": "w8a8", "dialect": "gguf"}, "dialect: 'gguf' is not known"),
        (
            {"scheme": "w8a8", "rules": [Rule("*", "w3")]},
            "--scheme-for *=w3: 'w3' is not known",
        ),
        (
            {"scheme": "w8a8", "rules": [Rule("*", "w4a4")]},
            "dialect compressed-tensors cannot store scheme w4a4",
        ),
        ({"scheme": "w4a16", "group_size": 12}, "--group-size is 12"),
        ({"scheme": "w4a16", "group_size": 0}, "--group-size is 0"),
        (
            {"scheme": "w8a8", "group_size": 128},
            "--group-size is 128, and w8a8 of compressed-tensors has no groups of columns",
        ),
        (
            {"scheme": "w4a8", "dialect": "modelslim", "group_size": 128},
            "--group-size is 128, and w4a8 of modelslim has no groups of columns",
        ),
        (
            {"scheme": "w8a8", "powers_of_two": True},
            "--ue8m0 is given beside dialect compressed-tensors",
        ),
    ],
)
def test_what_means_nothing_is_refused(arguments: dict[str, Any], what: str) -> None:
    with pytest.raises(QuantizationConfigError) as caught:
        Recipe.of(**arguments)
    assert caught.value.what == what
    assert caught.value.expected
    assert caught.value.remedy


def test_the_first_rule_that_matches_counts_and_ignoring_comes_before() -> None:
    recipe = Recipe.of(
        "w4a16",
        ignore=["*.a"],
        rules=[Rule("*.experts.*", "w8a8"), Rule("*.down_proj", "float"), Rule("*.a", "w8a8")],
    )

    def scheme(module: str) -> tuple[WeightScheme, str]:
        found = recipe.module_scheme(module, 64, 128)
        return found.scheme, found.reason

    assert scheme("x.experts.0.down_proj") == (WeightScheme.W8A8, "--scheme-for *.experts.*=w8a8")
    assert scheme("x.down_proj") == (WeightScheme.FLOAT, "--scheme-for *.down_proj=float")
    assert scheme("x.a") == (WeightScheme.FLOAT, "--ignore *.a")
    assert scheme("x.b") == (WeightScheme.W4A16, "--scheme w4a16")


@pytest.mark.parametrize(
    ("scheme", "dialect", "size", "reason"),
    [
        ("w4a16", None, (64, 12), "w4a16 needs columns in multiples of 8, and it has 12"),
        ("nvfp4", None, (64, 24), "nvfp4 needs columns in multiples of 16, and it has 24"),
        ("w4a8", "modelslim", (7, 64), "modelslim stores w4a8 in pairs of rows, and it has 7"),
    ],
)
def test_what_does_not_fit_stays_unquantised(
    scheme: str, dialect: str | None, size: tuple[int, int], reason: str
) -> None:
    found = Recipe.of(scheme, dialect).module_scheme("m", *size)
    assert (found.scheme, found.reason) == (WeightScheme.FLOAT, reason)


def test_groups() -> None:
    assert Recipe.of("w4a16").module_scheme("m", 64, 256).group_size == 128
    partial = Recipe.of("w4a16").module_scheme("m", 64, 192)
    assert partial.group_size is None
    assert partial.reason == "--scheme w4a16; 192 columns are no whole groups"
    assert Recipe.of("w4a16", group_size=64).module_scheme("m", 64, 192).group_size == 64
    assert Recipe.of("w4a4").module_scheme("m", 64, 256).group_size is None
    assert Recipe.of("w4a4", group_size=64).module_scheme("m", 64, 256).group_size == 64
    assert Recipe.of("w8a8").module_scheme("m", 64, 256).group_size is None


def test_powers_of_two() -> None:
    recipe = Recipe.of("fp8-block", powers_of_two=True)
    assert recipe.module_scheme("m", 64, 64).scale_format is ScaleFormat.UE8M0


def test_static_scales_ask_for_ranges() -> None:
    assert Recipe.of("nvfp4").needs_input_ranges
    assert Recipe.of("w8a8", "modelslim", rules=[Rule("*", "w8a8-static")]).needs_input_ranges
    assert not Recipe.of("w4a16", ignore=["x"]).needs_input_ranges
