"""The command line: one verb a file, one place where errors become messages."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import click


def command_tree() -> click.Group:
    """The command ``mortise`` with all its verbs."""
    from mortise.cli.tree import mortise

    return mortise
