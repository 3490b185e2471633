"""A page for each hook: a head made of its specification, and a contract written by hand.

Run as a program it writes the heads anew; a hook without a page gets one, to be filled in.
"""

from __future__ import annotations

import ast
import inspect
import re
from typing import TYPE_CHECKING

from mortise import plugin
from mortise.spec import hooks
from tests.docs.docstrings import described
from tests.docs.pages import DOCS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

FOLDER = DOCS / "reference" / "hooks"
BEGIN = """\
<!-- Generated from the specification by `python -m tests.docs.hook_pages`; a test compares. -->"""
END = "<!-- What follows is written by hand. -->"
SECTIONS = (
    "Contract",
    "Shapes and dtypes",
    "Aliasing",
    "Streams and graphs",
    "Errors",
    "Versions",
    "Example",
)
"""Headings of what is written by hand, in order."""


def page_of(hook: str) -> Path:
    """Where a hook's page is."""
    return FOLDER / f"{hook}.md"


def head(hook: str) -> str:
    """What the specification says of a hook: its facts, signature, meaning and parameters."""
    function = getattr(hooks, hook)
    said = described(function.__doc__)
    signature, parameters = shown_signature(function), inspect.signature(function).parameters
    rows = [
        f"| `{name}` | {linked(parameter.annotation)} | {said.arguments.get(name, '')} |"
        for name, parameter in parameters.items()
    ]
    parts = [
        f"# {hook}",
        BEGIN,
        "\n".join(["| version | phase | answered together with |", "|---|---|---|", facts(hook)]),
        f"```py\n{signature}\n```",
        *said.paragraphs,
        "\n".join(["| parameter | type | meaning |", "|---|---|---|", *rows]),
        f"**Returns** {linked(inspect.signature(function).return_annotation)}. {said.returns}",
        END,
    ]
    return "\n\n".join(parts)


def facts(hook: str) -> str:
    """The row of a hook's version, phase and pair."""
    spec = hooks.HOOKS[hook]
    pairs = [f"[`{other}`]({other}.md)" for other in sorted(partners(hook))]
    return f"| {spec.version} | {spec.phase.value} | {', '.join(pairs) or 'no other'} |"


def partners(hook: str) -> set[str]:
    """The hooks that the same backend has to answer."""
    return {name for pair in hooks.PAIRED_HOOKS if hook in pair for name in pair} - {hook}


def shown_signature(function: Callable[..., object]) -> str:
    """The function's first lines as the specification writes them."""
    source = inspect.getsource(function)
    (node,) = ast.parse(source).body
    assert isinstance(node, ast.FunctionDef)
    lines = source.splitlines()[node.lineno - 1 : node.body[0].lineno - 1]
    return "\n".join([*lines[:-1], f"{lines[-1]} ..."])


def linked(annotation: str) -> str:
    """A type as code, with a link where it is a record of its own page."""
    pieces = re.split(r" \| ", annotation)
    return " or ".join(linked_name(piece) for piece in pieces)


def linked_name(name: str) -> str:
    """One name as code, with its link."""
    name = re.sub(r"^Literal\[NotSupported\.(\w+)\]$", r"\1", name)
    known = name in plugin.__all__ and inspect.isclass(getattr(plugin, name))
    return f"[`{name}`](../records.md#{name.lower()})" if known else f"`{name}`"


def written_by_hand(text: str) -> str:
    """What follows the head on a page."""
    return text.partition(END)[2].strip()


def blank() -> str:
    """The headings of a page that somebody has to fill in."""
    return "\n\n".join(f"## {section}" for section in SECTIONS)


def sections(text: str) -> dict[str, str]:
    """Each section that is written by hand, by its heading."""
    _, *rest = re.split(r"^## (.+)$", written_by_hand(text), flags=re.MULTILINE)
    return {name: body.strip() for name, body in zip(rest[::2], rest[1::2], strict=True)}


def pages() -> Iterator[tuple[Path, str]]:
    """Each hook's page as it should be."""
    for hook in hooks.HOOKS:
        path = page_of(hook)
        written = written_by_hand(path.read_text(encoding="utf-8")) if path.is_file() else blank()
        yield path, f"{head(hook)}\n\n{written}\n"


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for path, text in pages():
        path.write_text(text, encoding="utf-8")
