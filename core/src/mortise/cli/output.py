"""Printing: tables and messages for people, documents for programs."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any, Final

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

SCHEMA: Final = 1
"""Version of the documents that ``--json`` prints; within one, no field goes or changes."""

# Somebody greps through a pipe: every row on one line, whatever its length.
PIPE_WIDTH: Final = 10_000


def results() -> Console:
    """Standard output."""
    return _console(stderr=False)


def messages() -> Console:
    """Standard error."""
    return _console(stderr=True)


def _console(*, stderr: bool) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else PIPE_WIDTH
    return Console(stderr=stderr, width=width, highlight=False)


def say(word: str, style: str, text: str) -> None:
    """One message on standard error, led by a coloured word; nothing in it is markup."""
    # The terminal folds long lines by itself, so that a path can be copied in one piece.
    messages().print(Text.assemble((f"{word}: ", style), text), soft_wrap=True)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], title: str = "") -> Table:
    """Cells are text, never markup; a long cell folds within its column."""
    made = Table(
        box=None, title=title or None, title_justify="left", pad_edge=False, show_edge=False
    )
    for column in columns:
        made.add_column(column, overflow="fold", header_style="bold")
    for row in rows:
        made.add_row(*map(Text, row))
    return made


def document(**fields: Any) -> dict[str, Any]:
    """A document with its version first."""
    return {"schema": SCHEMA, **fields}


def print_json(value: Any, *, err: bool = False) -> None:
    """One document, indented, in the order its fields were given."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False), err=err)
