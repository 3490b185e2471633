"""Nothing process-wide: no module holds a value that a second engine could find changed.

The rule, for every module of core and plugins:

- no ``global`` statement;
- every value bound at module level is immutable through and through: a number, text, enumeration
  member, dtype, compiled pattern, frozen record, tuple, frozen set or read-only mapping of such
  values, or an object that can hold nothing (``__slots__ = ()``); or it is code: a function, class,
  module, type alias, command of the command line, hook marker, logger;
- or it is a context variable without a default, whose value belongs to one thread or task and is
  not shared by the process;
- no memoising decorator at module level, because its memory is state as well;
- a class holds no list, dict or set of its own, apart from what Python and pydantic keep there.

``__all__`` is a list by convention and is left alone.
"""

from __future__ import annotations

import ast
import contextvars
import dataclasses
import enum
import functools
import importlib
import inspect
import logging
import re
import types
import typing
from pathlib import PurePath

import click
import pluggy
import pydantic
import pytest
import torch

from tests.meta.tree import module_name, python_files, shown, syntax_tree

PLAIN = (
    bool,
    bytes,
    complex,
    enum.Enum,
    float,
    int,
    PurePath,
    range,
    re.Pattern,
    str,
    torch.device,
    torch.dtype,
    type(None),
    type(Ellipsis),
)
CODE = (
    click.Command,
    logging.Logger,
    pluggy.HookimplMarker,
    pluggy.HookspecMarker,
    type,
    types.BuiltinFunctionType,
    types.FunctionType,
    types.GenericAlias,
    types.ModuleType,
    types.UnionType,
    typing.NewType,
    typing.ParamSpec,
    typing.TypeVar,
)
CONTAINERS = (bytearray, dict, list, set)


def is_type_form(value: object) -> bool:
    """Whether a value is a typing construct such as ``Literal["a"]``."""
    return typing.get_origin(value) is not None or type(value).__module__ in {
        "typing",
        "annotated_types",
    }


def holds_nothing(value: object) -> bool:
    """Whether an object of ours has no place for an attribute: only empty slots in its classes."""
    kinds = [kind for kind in type(value).__mro__ if kind is not object]
    return bool(kinds) and all(vars(kind).get("__slots__") == () for kind in kinds)


def belongs_to_a_thread(value: object) -> bool:
    """Whether a value is a context variable that nothing is in before somebody puts it there."""
    if not isinstance(value, contextvars.ContextVar):
        return False
    try:
        contextvars.Context().run(value.get)
    except LookupError:
        return True
    return False


def fields_of(value: object) -> list[object] | None:
    """The parts of a frozen record, or None if the value is not one."""
    if dataclasses.is_dataclass(value) and type(value).__dataclass_params__.frozen:  # type: ignore[attr-defined]
        return [getattr(value, field.name) for field in dataclasses.fields(value)]
    if isinstance(value, pydantic.BaseModel) and value.model_config.get("frozen"):
        return [getattr(value, name) for name in type(value).model_fields]
    return None


def is_immutable(value: object) -> bool:
    match value:
        case functools._lru_cache_wrapper():
            return False
        case tuple() | frozenset():
            return all(map(is_immutable, value))
        case types.MappingProxyType():
            return all(map(is_immutable, value.values()))
        case functools.partial():
            return all(map(is_immutable, (value.func, *value.args, *value.keywords.values())))
    if isinstance(value, (*PLAIN, *CODE)) or is_type_form(value):
        return True
    if holds_nothing(value) or belongs_to_a_thread(value):
        return True
    fields = fields_of(value)
    return fields is not None and all(map(is_immutable, fields))


def bound_names(tree: ast.Module) -> set[str]:
    """Names that a module binds outside functions and classes, imports excepted."""
    names: set[str] = set()
    pending: list[ast.AST] = list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
            continue
        pending.extend(ast.iter_child_nodes(node))
    return names - {"__all__"}


def mutable_in_class(owner: type) -> list[str]:
    """Names of containers that a class shares between its objects."""
    kept = {"model_config"}
    return [
        name
        for name, value in vars(owner).items()
        if isinstance(value, CONTAINERS)
        and name not in kept
        and not name.startswith(("_", "model_"))
    ]


class Stateless:
    __slots__ = ()


@dataclasses.dataclass(frozen=True)
class FrozenRecord:
    value: object


@pytest.mark.parametrize(
    "value",
    [
        [],
        {},
        set(),
        ({},),
        FrozenRecord([]),
        types.MappingProxyType({"a": []}),
        functools.cache(len),
        contextvars.ContextVar("shared", default=None),
        object(),
    ],
)
def test_the_rule_rejects(value: object) -> None:
    assert not is_immutable(value)


@pytest.mark.parametrize(
    "value",
    [
        1,
        ("a", frozenset({1})),
        FrozenRecord((1,)),
        Stateless(),
        torch.float32,
        len,
        contextvars.ContextVar("one thread's"),
    ],
)
def test_the_rule_accepts(value: object) -> None:
    assert is_immutable(value)


def test_bound_names_are_found_in_nested_blocks() -> None:
    tree = ast.parse(
        "import a\nif a:\n    b = {}\ntry:\n    c: int = 1\nfinally:\n    def d():\n        e = 1\n"
    )
    assert bound_names(tree) == {"b", "c", "d"}


# To run it is the purpose of a __main__.py.
IMPORTABLE = [path for path in python_files() if path.name != "__main__.py"]


@pytest.mark.parametrize("path", IMPORTABLE, ids=shown)
def test_no_module_holds_mutable_state(path) -> None:
    tree = syntax_tree(path)
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Global)], "global statement"
    module = importlib.import_module(module_name(path))
    bound = {name: getattr(module, name) for name in bound_names(tree) if hasattr(module, name)}
    found = [
        f"{name} ({type(value).__name__})"
        for name, value in bound.items()
        if not is_immutable(value)
    ]
    found += [
        f"{owner.__name__}.{name}"
        for owner in bound.values()
        if inspect.isclass(owner) and owner.__module__ == module.__name__
        for name in mutable_in_class(owner)
    ]
    assert not found, f"{shown(path)} holds mutable state: {', '.join(found)}"
