"""Reads the vendor's Python sources: signatures without running them, helpers alone."""

from __future__ import annotations

import ast
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

FILES = ("__init__.py", "utils/layout.py", "utils/math.py")

Signature = tuple[tuple[str, str], ...]
"""Parameters in order, each with the text of its default, or nothing."""


def surface(package: Path) -> dict[str, Signature | None]:
    """By public name: its parameters, or None where it is the compiled object's own."""
    found: dict[str, Signature | None] = {}
    for name in FILES:
        for node in _statements(ast.parse((package / name).read_text(encoding="utf-8"))):
            match node:
                case ast.FunctionDef(name=function):
                    found[function] = _signature(node)
                case ast.Assign(targets=[ast.Name(id=alias)], value=ast.Name(id=function)):
                    found[alias] = found.get(function)
                case ast.Assign(
                    targets=[ast.Name(id=alias)], value=ast.Attribute(value=ast.Name(id="_C"))
                ):
                    found.setdefault(alias, None)
    return {name: signature for name, signature in found.items() if not name.startswith("_")}


def helpers(file: Path) -> dict[str, Any]:
    """Run one file that imports torch alone."""
    return _run(ast.parse(file.read_text(encoding="utf-8")), file, {})


def helper(file: Path, name: str, **known: object) -> Any:
    """One function of a file, with what it calls handed in."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    own = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
    return _run(ast.Module(list(own), []), file, known)[name]


def _run(tree: ast.Module, file: Path, known: dict[str, object]) -> dict[str, Any]:
    module = ModuleType(f"vendor_{file.stem}")
    vars(module).update(known)
    exec(compile(tree, str(file), "exec"), vars(module))
    return vars(module)


def _statements(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Try | ast.If):
            yield from _statements(node)
        else:
            yield node


def _signature(node: ast.FunctionDef) -> Signature:
    names = [argument.arg for argument in node.args.args]
    defaults = [ast.unparse(value) for value in node.args.defaults]
    return tuple(zip(names, [""] * (len(names) - len(defaults)) + defaults, strict=True))
