"""One idea a file: every module says in one sentence what it is."""

from __future__ import annotations

import ast
import re

import pytest

from tests.meta.tree import python_files, shown, syntax_tree

# Pages that are read as a whole: the tree of errors, the contract of the hooks.
PAGES = {"core/src/mortise/errors.py", "core/src/mortise/spec/hooks.py"}
NEXT_SENTENCE = re.compile(r"[.!?]['\"`)]*\s+(?=[A-Z`'\"(])")


def complaint(docstring: str | None) -> str | None:
    """What is wrong with a module's docstring, if anything."""
    if not docstring:
        return "has no docstring"
    if not docstring.rstrip().endswith("."):
        return "does not end with a full stop"
    if NEXT_SENTENCE.search(docstring.strip()):
        return "has more than one sentence"
    return None


@pytest.mark.parametrize("docstring", [None, "", "No stop", "One. Two.", "One.\n\nTwo more."])
def test_the_rule_rejects(docstring: str | None) -> None:
    assert complaint(docstring)


def test_every_module_has_one_sentence() -> None:
    found = {
        shown(path): wrong
        for path in python_files()
        if shown(path) not in PAGES and (wrong := complaint(ast.get_docstring(syntax_tree(path))))
    }
    assert not found, "\n".join(f"{path} {wrong}" for path, wrong in found.items())


def test_every_page_has_a_docstring() -> None:
    pages = [path for path in python_files() if shown(path) in PAGES]
    assert len(pages) == len(PAGES)
    assert all(ast.get_docstring(syntax_tree(path)) for path in pages)
