"""Which of several processes speaks to the user: the first one."""

from __future__ import annotations

import os
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mortise.env import Launch


def own_launch() -> Launch | None:
    """This process's place among several, as the boundary of the command line found it."""
    context = click.get_current_context(silent=True)
    launch: Launch | None = None if context is None else context.find_root().obj
    return launch


def is_speaker(launch: Launch | None) -> bool:
    """Whether results and warnings of this process are shown."""
    return launch is None or launch.rank == 0


@contextmanager
def one_voice(launch: Launch | None) -> Iterator[None]:
    """Drop what a process prints whose results another one shows as well."""
    if is_speaker(launch):
        yield
        return
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
        yield
