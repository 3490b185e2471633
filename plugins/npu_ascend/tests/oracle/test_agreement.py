"""The emulator beside what the vendor published: schemas, and shapes and dtypes of results.

Needs the network, or ``--torch-npu-wheel``; without either it says so and is skipped.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import pytest

from mortise_npu_ascend.emulator import numbers
from mortise_npu_ascend.emulator.schemas import SCHEMA_OF

pytestmark = pytest.mark.slow

PAGE: Final = Path(__file__).parents[4] / "docs" / "reference" / "ascend-emulator.md"
WITHOUT_SHAPE_FUNCTION: Final = {"npu_convert_weight_to_int4pack"}


def of_operator(verdict: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return [case for case in verdict["cases"] if case["operator"] == name]


@pytest.mark.parametrize("name", SCHEMA_OF)
def test_schema(verdict: dict[str, Any], name: str) -> None:
    ours, theirs = verdict["schemas"][name]
    assert ours == theirs


@pytest.mark.parametrize("name", SCHEMA_OF)
def test_shapes_and_dtypes(verdict: dict[str, Any], name: str) -> None:
    cases = of_operator(verdict, name)
    assert [case for case in cases if not case["differs"]], "no case, so nothing was compared"
    for case in cases:
        if not case["differs"]:
            assert case["outcome"] is None, f"{case['says']}: {case['outcome']}"


def test_differences_are_real_and_told(verdict: dict[str, Any]) -> None:
    """A difference that has gone, or that the page keeps to itself, is not allowed to stand."""
    page = PAGE.read_text(encoding="utf-8")
    differing = [case for case in verdict["cases"] if case["differs"]]
    assert differing
    for case in differing:
        outcome = case["outcome"] or "they agree"
        assert case["found"] in outcome, f"{case['operator']}, {case['says']}: {outcome}"
        assert f"| `{case['operator']}` | {case['differs']} |" in page


def test_every_operator_is_emulated(verdict: dict[str, Any]) -> None:
    assert sorted(verdict["operators"]) == sorted(SCHEMA_OF)


def test_where_the_vendor_has_no_shape_function(verdict: dict[str, Any]) -> None:
    assert set(SCHEMA_OF) - set(verdict["shape_functions"]) == WITHOUT_SHAPE_FUNCTION


def test_numbers_of_dtypes(verdict: dict[str, Any]) -> None:
    named = {name.rpartition(".")[2]: int(number) for number, name in verdict["dtypes"].items()}
    ours = {name.lower(): value for name, value in vars(numbers).items() if name.isupper()}
    assert named
    assert named.items() <= ours.items()
