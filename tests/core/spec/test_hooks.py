"""The table of hooks, the specifications of the same names and the reference say the same."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

from mortise.backends.ops import Ops
from mortise.reference.backend import ReferenceBackend
from mortise.spec import hooks
from mortise.spec.hooks import HOOKS, PAIRED_HOOKS
from mortise.spec.roles import Phase

PHASES = list(Phase)


def specified() -> dict[str, ast.FunctionDef]:
    """Functions of the module that carry the marker, in the order of the page."""
    tree = ast.parse(Path(hooks.__file__).read_text(encoding="utf-8"))
    return {
        node.name: node
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
        and any("hookspec" in ast.unparse(decorator) for decorator in node.decorator_list)
    }


def test_the_table_is_the_page() -> None:
    assert set(HOOKS) == set(specified())
    assert all(name == spec.name and spec.version >= 1 for name, spec in HOOKS.items())


def test_the_table_is_in_the_order_in_which_phases_run() -> None:
    order = [PHASES.index(spec.phase) for spec in HOOKS.values()]
    assert order == sorted(order)


@pytest.mark.parametrize("name", HOOKS)
def test_a_hook_is_a_contract_and_not_code(name: str) -> None:
    function = specified()[name]
    arguments = function.args
    assert [ast.unparse(decorator) for decorator in function.decorator_list] == [
        "hookspec(firstresult=True)"
    ]
    assert not (arguments.defaults or arguments.kwonlyargs or arguments.vararg or arguments.kwarg)
    assert 1 <= len(arguments.args) <= 6
    assert all(argument.annotation for argument in arguments.args)
    assert function.returns is not None
    assert "Returns:" in (ast.get_docstring(function) or "")
    with pytest.raises(AssertionError):
        getattr(hooks, name)(*[None] * len(arguments.args))


@pytest.mark.parametrize("name", HOOKS)
def test_the_reference_answers_with_the_signature_of_the_specification(name: str) -> None:
    wanted = list(inspect.signature(getattr(hooks, name)).parameters)
    assert list(inspect.signature(getattr(ReferenceBackend, name)).parameters) == ["self", *wanted]


def test_the_bound_table_has_a_field_for_every_hook() -> None:
    assert list(HOOKS) == [name for name in Ops.__dataclass_fields__ if name in HOOKS]


def test_hooks_that_share_a_record_are_hooks() -> None:
    for pair in PAIRED_HOOKS:
        assert len(pair) > 1
        assert pair <= set(HOOKS)
