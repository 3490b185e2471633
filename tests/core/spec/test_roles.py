"""Every kind of pass says whether it needs a plan, and a new kind cannot be forgotten anywhere."""

from __future__ import annotations

import ast
import enum
from typing import TYPE_CHECKING

import pytest
from tests.meta.tree import python_files, shown, syntax_tree

from mortise.spec import dispatch, experts, qkv, roles, weights
from mortise.spec.roles import ForwardMode

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

NEEDS_SCHEDULE = {
    ForwardMode.PREFILL: False,
    ForwardMode.DECODE: True,
    ForwardMode.IDLE: True,
    ForwardMode.TARGET_VERIFY: True,
    ForwardMode.DRAFT_EXTEND: True,
}
ENUMERATIONS = {
    found.__name__: found
    for module in (roles, dispatch, experts, qkv, weights)
    for found in vars(module).values()
    if isinstance(found, type) and issubclass(found, enum.Enum) and found is not enum.StrEnum
}


def test_the_answer_of_every_mode_is_written_down() -> None:
    assert {mode: mode.needs_schedule for mode in ForwardMode} == NEEDS_SCHEDULE


def test_an_unknown_mode_is_an_error_instead_of_a_guess() -> None:
    stranger = str.__new__(ForwardMode, "stranger")
    stranger._name_ = stranger._value_ = "stranger"
    with pytest.raises(AssertionError):
        _ = stranger.needs_schedule


def matches() -> Iterator[tuple[Path, ast.Match]]:
    for path in python_files():
        for node in ast.walk(syntax_tree(path)):
            if isinstance(node, ast.Match):
                yield path, node


def members(pattern: ast.pattern) -> Iterator[tuple[str, str]]:
    """``(enumeration, member)`` of every value in a pattern."""
    for node in ast.walk(pattern):
        match node:
            case ast.MatchValue(value=ast.Attribute(value=ast.Name(id=name), attr=member)):
                yield name, member


def test_every_match_on_a_contract_enumeration_names_all_members_and_ends_in_assert_never() -> None:
    """So that a new member fails the type checker and this test in each place it concerns."""
    checked = 0
    for path, node in matches():
        named = [found for case in node.cases for found in members(case.pattern)]
        for enumeration in {name for name, _ in named} & ENUMERATIONS.keys():
            if enumeration == "WeightScheme" and "quantization" in path.parts:
                # A published layout stores some schemes, and is an error for the others.
                continue
            checked += 1
            place = f"{shown(path)}:{node.lineno}"
            expected = set(ENUMERATIONS[enumeration].__members__)
            assert {member for name, member in named if name == enumeration} == expected, place
            assert "assert_never" in ast.unparse(node.cases[-1]), place
    assert checked >= 5, "passes, splits of projections, formats of rows, schemes of weights"


def test_the_text_of_members_is_what_people_and_programs_read() -> None:
    """Changing one breaks configuration files, reports and recorded runs."""
    assert [mode.value for mode in ForwardMode] == [
        "prefill",
        "decode",
        "idle",
        "target_verify",
        "draft_extend",
    ]
    assert [dtype.value for dtype in dispatch.DispatchDtype] == [
        "fp32",
        "bf16",
        "fp8",
        "int8",
        "nvfp4",
    ]
    assert [role.value for role in roles.ModelRole] == ["main", "draft"]
    assert [layout.value for layout in qkv.QKVLayout] == ["interleaved", "contiguous"]
