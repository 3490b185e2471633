"""Nothing process-wide: no environment variable is written, and two files alone read them."""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING

import pytest

from tests.meta.tree import python_files, shown, syntax_tree

if TYPE_CHECKING:
    from collections.abc import Iterator

MAPPINGS = {"environ", "environb"}
WRITERS = {"putenv", "unsetenv"}
READERS = {"getenv", "getenvb"}
WRITING_METHODS = {"clear", "pop", "popitem", "setdefault", "update", "__setitem__", "__delitem__"}


def called_name(node: ast.expr) -> str:
    """``environ`` for ``environ`` and for ``os.environ``."""
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name
    return ""


def environment_writes(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.walk(tree):
        match node:
            case ast.Subscript(value=mapping, ctx=ast.Store() | ast.Del()) if (
                called_name(mapping) in MAPPINGS
            ):
                yield node
            case ast.AugAssign(target=mapping) if called_name(mapping) in MAPPINGS:
                yield node
            case ast.Call(func=ast.Attribute(value=mapping, attr=method)) if (
                called_name(mapping) in MAPPINGS and method in WRITING_METHODS
            ):
                yield node
            case ast.Call(func=function) if called_name(function) in WRITERS:
                yield node


def environment_mentions(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Name(id="os"), attr=name) if name in MAPPINGS | READERS:
                yield node
            case ast.ImportFrom(module="os", names=names) if {alias.name for alias in names} & (
                MAPPINGS | READERS | WRITERS
            ):
                yield node


@pytest.mark.parametrize(
    "source",
    [
        "os.environ['A'] = '1'",
        "del os.environ['A']",
        "os.environ |= {}",
        "environ.update(A='1')",
        "os.environ.setdefault('A', '1')",
        "os.putenv('A', '1')",
    ],
)
def test_the_scan_finds_a_write(source: str) -> None:
    assert list(environment_writes(ast.parse(source)))


def test_no_environment_variable_is_written() -> None:
    found = [
        f"{shown(path)}:{node.lineno}"  # type: ignore[attr-defined]
        for path in python_files()
        for node in environment_writes(syntax_tree(path))
    ]
    assert not found, f"pass an argument instead of writing the environment: {found}"


READING = {
    "core/src/mortise/env.py",
    # What the vendors' own libraries read, so that it can be checked and told of.
    "plugins/cuda_common/src/mortise_cuda_common/environment.py",
    "plugins/npu_ascend/src/mortise_npu_ascend/environment.py",
}


def test_only_few_files_read_the_environment() -> None:
    readers = {
        shown(path) for path in python_files() if any(environment_mentions(syntax_tree(path)))
    }
    assert readers == READING, "read the variable in mortise/env.py, once"
