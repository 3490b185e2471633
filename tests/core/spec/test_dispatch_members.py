"""A new dispatch format, mode, scheme or layout of scales cannot be forgotten anywhere.

Match statements are looked at in ``test_roles.py``, and by mypy through ``assert_never``.
"""

from __future__ import annotations

import dataclasses
import enum
import importlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, get_args

import click
import pytest
import torch
from tests.meta.tree import module_name, python_files

from mortise.cli import command_tree
from mortise.config.engine import DispatchChoice
from mortise.formats.rows import check_format
from mortise.reference.dispatch import POLICY
from mortise.spec import dispatch, weights
from mortise.spec.authority import DispatchPolicy, Exact, decide_by_authority
from mortise.spec.dispatch import (
    DispatchDtype,
    DispatchFormat,
    DispatchMode,
    DispatchRequest,
    Override,
)
from mortise.spec.roles import ModelRole
from mortise.spec.weights import WeightScheme

ENUMERATIONS = tuple(
    found
    for module in (dispatch, weights)
    for found in vars(module).values()
    if isinstance(found, type) and issubclass(found, enum.Enum) and found is not enum.StrEnum
)


def mappings_in(value: object) -> Iterator[Mapping[Any, Any]]:
    """Every mapping in a value of a module, also in records, tuples and sets."""
    if isinstance(value, Mapping):
        yield value
        for inner in value.values():
            yield from mappings_in(inner)
    elif isinstance(value, tuple | frozenset):
        for inner in value:
            yield from mappings_in(inner)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from mappings_in(getattr(value, field.name))


def forgotten(table: Mapping[Any, Any]) -> set[str]:
    """Members that a table lacks, where its keys are members of one enumeration."""
    kinds = {type(key) for key in table} & set(ENUMERATIONS)
    return {str(member) for kind in kinds for member in kind if member not in table}


def test_a_table_with_a_gap_is_found() -> None:
    gap = MappingProxyType({DispatchDtype.FP32: 1, DispatchDtype.BF16: 2})
    assert forgotten(gap) == {"fp8", "int8", "nvfp4"}
    assert list(mappings_in((1, frozenset(), gap))) == [gap]
    assert forgotten(MappingProxyType(dict.fromkeys(DispatchDtype))) == set()
    assert gap not in mappings_in(POLICY)
    assert POLICY.actions in mappings_in(POLICY)


def test_every_table_over_an_enumeration_of_the_contract_knows_all_its_members() -> None:
    found: dict[str, set[str]] = {}
    keyed_by_dtype = 0
    for path in python_files():
        # A published layout stores some schemes, and is an error for the others.
        if path.name == "__main__.py" or "quantization" in path.parts:
            continue
        module = importlib.import_module(module_name(path))
        for name, value in vars(module).items():
            for table in mappings_in(value):
                keyed_by_dtype += any(isinstance(key, DispatchDtype) for key in table)
                if missing := forgotten(table):
                    found[f"{module.__name__}.{name}"] = missing
    assert not found
    assert keyed_by_dtype >= 5, "the policies of the reference and of four generations of chips"


def test_a_policy_cannot_be_made_without_an_answer_to_each() -> None:
    for dtype in DispatchDtype:
        actions = {one: Exact() for one in DispatchDtype if one is not dtype}
        with pytest.raises(AssertionError, match=dtype.value):
            replace(POLICY, actions=MappingProxyType(actions))


def test_a_stranger_is_an_error_instead_of_a_guess() -> None:
    stranger = str.__new__(DispatchDtype, "stranger")
    stranger._name_ = stranger._value_ = "stranger"
    request = DispatchRequest(
        role=ModelRole.MAIN,
        layer="x",
        mode=DispatchMode.NORMAL,
        override=Override(value=stranger, source="a test"),
        scheme_w13=WeightScheme.FLOAT,
        scheme_w2=WeightScheme.FLOAT,
        accepted=(stranger,),
        compute_dtype=torch.bfloat16,
    )
    policy = DispatchPolicy(
        device="a chip",
        default=None,
        actions=MappingProxyType({**POLICY.actions, stranger: Exact()}),
        row_layouts=POLICY.row_layouts,
    )
    with pytest.raises(KeyError):
        decide_by_authority(request, POLICY)
    # A device that knows it does not make the core know its scales.
    with pytest.raises(AssertionError):
        decide_by_authority(request, policy)
    with pytest.raises(KeyError):
        check_format(DispatchFormat(dtype=stranger))


def test_users_can_ask_for_every_format_but_fp32() -> None:
    """Rows are fp32 where the whole model is: that is asked for by ``dtype``."""
    choices = ["auto", *(dtype for dtype in DispatchDtype if dtype is not DispatchDtype.FP32)]
    assert set(get_args(DispatchChoice)) == set(choices)
    offered = {
        option.metavar
        for command in command_tree().commands.values()
        for option in command.params
        if isinstance(option, click.Option) and "dispatch_dtype" in (option.name or "")
    }
    assert [set((text or "").split("|")) for text in offered] == [set(choices)]
