"""A hook is real: the reference declares it and answers it."""

from __future__ import annotations

import ast
import tomllib

import pytest

from mortise.spec.hooks import HOOKS
from tests.meta.tree import CORE_SOURCES, python_files, syntax_tree

REFERENCE = CORE_SOURCES / "mortise" / "reference"


def test_the_reference_declares_every_hook() -> None:
    manifest = tomllib.loads((REFERENCE / "backend.toml").read_text(encoding="utf-8"))
    assert manifest["implements"] == {name: spec.version for name, spec in HOOKS.items()}


@pytest.mark.parametrize("hook", HOOKS)
def test_the_reference_implements_every_hook(hook: str) -> None:
    marked = [
        node
        for path in python_files(REFERENCE)
        for node in ast.walk(syntax_tree(path))
        if isinstance(node, ast.FunctionDef)
        and node.name == hook
        and any(ast.unparse(decorator).startswith("hookimpl") for decorator in node.decorator_list)
    ]
    assert len(marked) == 1
