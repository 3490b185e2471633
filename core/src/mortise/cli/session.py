"""A model loaded for the command line: with a progress bar, and with its news told."""

from __future__ import annotations

import sys
import time
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from mortise.cli.failure import show_warning
from mortise.cli.news import news_of
from mortise.cli.output import messages
from mortise.cli.speaker import is_speaker, own_launch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rich.progress import Progress, TaskID

    from mortise.config import ResolvedConfig
    from mortise.engine.llm import LLM
    from mortise.engine.warmup import WarmupReport

PATIENCE_SECONDS = 0.5
"""Work that takes no longer shows no bar."""


def load_llm(
    resolved: ResolvedConfig, told: set[str] | None = None, *, warm_up: bool = True
) -> LLM:
    """Load the model and tell what was warned of, and the news there is of it.

    Args:
        resolved: the configuration.
        told: warnings that a reader has had already, of models loaded before; they are not
            repeated, and what is told now is added.
        warm_up: compile what the backend compiles; the model is not returned before that is done.
    """
    from mortise.engine.llm import LLM

    with (
        warnings.catch_warnings(record=True) as warned,
        progress_bar("loading", is_bytes=True) as advance,
    ):
        llm = LLM(resolved, progress=advance, launch=own_launch(), warm_up=False)
    click.get_current_context().with_resource(llm)
    told = set() if told is None else told
    for text in (*(str(warning.message) for warning in warned), *news_of(llm)):
        if text not in told:
            show_warning(text)
            told.add(text)
    if warm_up:
        warm(llm)
    return llm


def warm(llm: LLM, *, ahead: bool = False) -> WarmupReport:
    """Compile what the backend compiles for the model, with a bar of its own."""
    try:
        with progress_bar("warming up") as advance:
            return llm.warm_up(advance, ahead=ahead)
    except BaseException as error:
        # The others would wait for a process that is not coming.
        llm.close(error)
        raise


@contextmanager
def progress_bar(what: str, *, is_bytes: bool = False) -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error, if that is a terminal and the work takes its time.

    Yields:
        A function to be told what is done and what there is.
    """
    if not sys.stderr.isatty() or not is_speaker(own_launch()):
        yield lambda _done, _total: None
        return
    bar = _Bar(what, is_bytes)
    try:
        yield bar.show
    finally:
        bar.stop()


class _Bar:
    def __init__(self, what: str, is_bytes: bool) -> None:
        self._what = what
        self._is_bytes = is_bytes
        self._started = time.perf_counter()
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def show(self, done: int, total: int) -> None:
        if time.perf_counter() - self._started < PATIENCE_SECONDS:
            return
        if self._progress is None:
            self._progress = _new_progress(self._is_bytes)
            self._progress.start()
            self._task = self._progress.add_task(self._what, total=total)
        assert self._task is not None
        self._progress.update(self._task, completed=done)

    def stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()


def _new_progress(is_bytes: bool) -> Progress:
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns: list[Any] = [
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn() if is_bytes else MofNCompleteColumn(),
        TimeRemainingColumn(),
    ]
    return Progress(*columns, console=messages(), transient=True)
