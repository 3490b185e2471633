from __future__ import annotations

import ast
import inspect
from importlib import import_module
from pathlib import Path

import pytest

import mortise.spec
from mortise import plugin
from mortise.spec import hooks

RECORD_MODULES = (
    "authority",
    "capabilities",
    "choices",
    "consumer",
    "dispatch",
    "doctor",
    "experts",
    "methods",
    "paged_mqa",
    "qkv",
    "reasons",
    "roles",
    "warmup",
    "weights",
)


def test_all_is_sorted_and_there() -> None:
    assert sorted(plugin.__all__) == sorted(set(plugin.__all__))
    assert all(hasattr(plugin, name) for name in plugin.__all__)


@pytest.mark.parametrize("name", RECORD_MODULES)
def test_every_record_of_the_contract_is_there(name: str) -> None:
    module = import_module(f"mortise.spec.{name}")
    defined = {
        name
        for name, value in vars(module).items()
        if inspect.isclass(value) and value.__module__ == module.__name__
        if not name.startswith("_")
    }
    assert defined <= set(plugin.__all__)


def test_every_module_of_the_contract_is_looked_at() -> None:
    folder = Path(mortise.spec.__file__).parent
    found = {path.stem for path in folder.glob("*.py")} - {"__init__", "hooks"}
    assert found == set(RECORD_MODULES)


def test_it_imports_the_contract_and_nothing_above() -> None:
    tree = ast.parse(Path(plugin.__file__).read_text(encoding="utf-8"))
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    own = {module for module in modules if module and module.startswith("mortise")}
    assert all(module.startswith(("mortise.spec", "mortise.errors")) for module in own)


def test_hookimpl_marks_for_the_projects_hooks() -> None:
    assert plugin.hookimpl.project_name == hooks.PROJECT
