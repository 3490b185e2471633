"""Docstrings as Markdown: what is said first, and what is said of each argument."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass

SECTION = re.compile(r"^(Args|Returns|Raises):$", flags=re.MULTILINE)
ENTRY = re.compile(r"^(?P<names>\*{0,2}\w+(?:, \w+)*): (?P<meaning>.*?)(?=^\S|\Z)", re.S | re.M)


@dataclass(frozen=True, slots=True)
class Described:
    """A docstring in its parts: paragraphs, and a meaning for each name of a section."""

    paragraphs: tuple[str, ...]
    arguments: dict[str, str]
    returns: str
    raises: dict[str, str]


def described(docstring: str | None) -> Described:
    """Take a docstring in Google's style apart."""
    head, *rest = SECTION.split(inspect.cleandoc(docstring or ""))
    sections = {
        name: inspect.cleandoc(text) for name, text in zip(rest[::2], rest[1::2], strict=True)
    }
    return Described(
        paragraphs=tuple(paragraph(text) for text in head.strip().split("\n\n") if text),
        arguments=entries(sections.get("Args", "")),
        returns=one_line(sections.get("Returns", "")),
        raises=entries(sections.get("Raises", "")),
    )


def entries(section: str) -> dict[str, str]:
    """The meaning of each name; names that share an entry have the same."""
    return {
        name.strip("* "): one_line(match["meaning"])
        for match in ENTRY.finditer(section)
        for name in match["names"].split(",")
    }


def paragraph(text: str) -> str:
    """A paragraph as Markdown; a table keeps its lines."""
    if re.search(r"^=+ ", text, flags=re.MULTILINE):
        return f"```text\n{text.replace('``', '')}\n```"
    return one_line(text)


def one_line(text: str) -> str:
    """Text without line breaks, its code as Markdown writes it."""
    text = re.sub(r":(?:class|func|meth|data):`~?(?:[\w.]*\.)?(\w+)`", r"`\1`", text)
    return " ".join(text.replace("``", "`").split())
