"""The set of reason codes is closed: each is given somewhere, by its name."""

from __future__ import annotations

import ast

from mortise.spec.reasons import ReasonCode
from tests.meta.tree import CORE_SOURCES, python_files, syntax_tree


def test_every_reason_code_is_given_somewhere() -> None:
    given = {
        node.attr
        for path in python_files(CORE_SOURCES)
        for node in ast.walk(syntax_tree(path))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "ReasonCode"
    }
    assert given == {code.name for code in ReasonCode}
