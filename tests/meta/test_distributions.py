"""The distributions declare what they import, in versions that were tested."""

from __future__ import annotations

import ast
import sys
import tomllib
from typing import TYPE_CHECKING

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.meta.tree import REPOSITORY, python_files, syntax_tree

if TYPE_CHECKING:
    from pathlib import Path

PROJECTS = tuple(
    sorted(REPOSITORY.glob("*/pyproject.toml"))
    + sorted(REPOSITORY.glob("plugins/*/pyproject.toml"))
)
# Needed by a library of ours for what we ask of it, not imported by us.
INDIRECT = {"numpy": "safetensors.torch writes tensors through it"}
IMPORTED_AS = {"mortise-core": "mortise", "sgl-deep-gemm": "deep_gemm"}
# Shared by backends, and none itself.
LIBRARIES = {"cuda_common"}


def project_table(path: Path) -> dict:
    return tomllib.loads(path.read_text(encoding="utf-8"))["project"]


def extras(path: Path) -> list[str]:
    """What the optional parts of one distribution require."""
    parts = project_table(path).get("optional-dependencies", {})
    return [text for requirements in parts.values() for text in requirements]


def import_names(requirements: list[str]) -> set[str]:
    names = {canonicalize_name(Requirement(text).name) for text in requirements}
    return {IMPORTED_AS.get(name, name.replace("-", "_")) for name in names}


def is_for_types_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def imported(root: Path, *, at_once: bool = False) -> set[str]:
    """Top-level packages that run-time imports below a root name, the standard library excepted.

    Args:
        root: of the sources.
        at_once: only those that are imported with the module, not later by a function.
    """
    names: set[str] = set()
    pending: list[ast.AST] = [syntax_tree(path) for path in python_files(root)]
    while pending:
        node = pending.pop()
        if at_once and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        match node:
            case ast.Import(names=aliases):
                names.update(alias.name.split(".")[0] for alias in aliases)
            case ast.ImportFrom(module=str(module), level=0):
                names.add(module.split(".")[0])
        if not is_for_types_only(node):
            pending.extend(ast.iter_child_nodes(node))
    return names - sys.stdlib_module_names - {"__future__"}


def constraints() -> dict[str, str]:
    lines = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {
        canonicalize_name(requirement.name): str(requirement.specifier)
        for requirement in requirements
    }


@pytest.mark.parametrize("path", PROJECTS, ids=lambda path: path.parent.name)
def test_declared_dependencies_are_the_imported_ones(path: Path) -> None:
    own = {package.name for package in (path.parent / "src").iterdir()}
    needed = imported(path.parent / "src") - own
    required = import_names(project_table(path)["dependencies"])
    optional = import_names(extras(path))
    assert not required & optional
    assert (required | optional) - set(INDIRECT) == needed - set(INDIRECT)


@pytest.mark.parametrize("path", PROJECTS, ids=lambda path: path.parent.name)
def test_optional_dependencies_are_imported_only_by_what_needs_them(path: Path) -> None:
    assert not import_names(extras(path)) & imported(path.parent / "src", at_once=True)


def test_imports_of_functions_are_told_from_those_of_modules() -> None:
    core = REPOSITORY / "core" / "src"
    assert "matplotlib" in imported(core) - imported(core, at_once=True)
    assert "torch" in imported(core, at_once=True)


@pytest.mark.parametrize("path", PROJECTS, ids=lambda path: path.parent.name)
def test_every_dependency_is_pinned_to_a_version_in_its_range(path: Path) -> None:
    pinned = constraints()
    for text in [*project_table(path)["dependencies"], *extras(path)]:
        requirement = Requirement(text)
        if requirement.name.startswith("mortise-"):
            continue
        pin = pinned[canonicalize_name(requirement.name)]
        assert pin.startswith("=="), pin
        assert requirement.specifier.contains(pin.removeprefix("==")), f"{text}, tested with {pin}"


def test_the_distributions_have_one_version_and_one_licence() -> None:
    assert len(PROJECTS) >= 4
    tables = [project_table(path) for path in PROJECTS]
    assert {table["version"] for table in tables} == {"0.1.0"}
    assert {table["license"] for table in tables} == {"Apache-2.0"}
    assert {table["requires-python"] for table in tables} == {">=3.11"}


def test_one_name_has_three_spellings() -> None:
    for path in PROJECTS:
        table = project_table(path)
        if path.parent.name in LIBRARIES:
            assert "entry-points" not in table
            continue
        backends = table["entry-points"]["mortise.backends"]
        expected = "reference" if path.parent.name == "core" else path.parent.name
        assert list(backends) == [expected]
        if expected != "reference":
            assert table["name"] == f"mortise-{expected.replace('_', '-')}"
            assert backends[expected].split(":")[0].split(".")[0] == f"mortise_{expected}"
