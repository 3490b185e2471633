"""Every emulated operator has torch_npu's name, arguments and defaults; every schema is used."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

import pytest
import torch

from mortise_npu_ascend.emulator import install
from mortise_npu_ascend.emulator.library import overload_of
from mortise_npu_ascend.emulator.operators import OPERATORS
from mortise_npu_ascend.emulator.schemas import SCHEMA_OF, SCHEMAS

if TYPE_CHECKING:
    from collections.abc import Callable

NAMES = [name for name, _ in OPERATORS]


def test_every_operator_has_a_schema_and_every_schema_an_operator() -> None:
    assert len(set(NAMES)) == len(NAMES)
    assert len(SCHEMA_OF) == len(SCHEMAS)
    assert set(NAMES) == set(SCHEMA_OF)


@pytest.mark.parametrize("schema", SCHEMAS, ids=list(SCHEMA_OF))
def test_torch_registers_what_the_string_says(schema: str) -> None:
    install()
    parsed = torch._C.parse_schema(f"npu::{schema}")
    overload = overload_of(schema.partition("(")[0])
    assert overload is not None
    assert overload._schema == parsed
    assert "self" not in [argument.name for argument in parsed.arguments]
    assert not parsed.is_mutable


@pytest.mark.parametrize(("name", "function"), OPERATORS, ids=NAMES)
def test_functions_have_the_arguments_of_their_schema(
    name: str, function: Callable[..., object]
) -> None:
    schema = torch._C.parse_schema(f"npu::{SCHEMA_OF[name]}")
    parameters = inspect.signature(function).parameters.values()
    assert [parameter.name for parameter in parameters] == [
        argument.name for argument in schema.arguments
    ]
    for parameter, argument in zip(parameters, schema.arguments, strict=True):
        assert (parameter.kind is parameter.KEYWORD_ONLY) == argument.kwarg_only, argument.name
        has_default = parameter.default is not parameter.empty
        assert has_default == argument.has_default_value(), argument.name
        if has_default and argument.name != "active_expert_range":
            assert parameter.default == argument.default_value, argument.name
