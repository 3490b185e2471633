"""A limit for calls that have none of their own."""

from __future__ import annotations

from concurrent.futures import Future
from threading import Thread
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

Result = TypeVar("Result")


def in_time(function: Callable[[], Result], seconds: float) -> Result:
    """Call ``function``, but wait for it no longer than ``seconds``.

    A store of torch waits for ever where its keeper is stopped or cut off without a word. Such a
    call is left behind in a thread that does not keep the process from ending.

    Raises:
        TimeoutError: it takes longer.
        BaseException: whatever ``function`` raises.
    """
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, name=f"at most {seconds:g} s", daemon=True).start()
    return future.result(timeout=seconds)
