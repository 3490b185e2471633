"""The root of a chain of exceptions, for messages that start with the cause."""

from __future__ import annotations

import traceback


def chain_of(error: BaseException) -> list[BaseException]:
    """The exceptions that led to ``error``, the first one first, ``error`` last."""
    chain = [error]
    while True:
        last = chain[-1]
        before = last.__cause__ or (None if last.__suppress_context__ else last.__context__)
        if before is None or before in chain:
            return chain[::-1]
        chain.append(before)


def describe(error: BaseException) -> str:
    """``ModuleNotFoundError: No module named 'x'``; the class alone where there is no message."""
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def raised_at(error: BaseException) -> str:
    """``file, line n`` of the innermost frame, or nothing where there is no traceback."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}, line {error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    # A missing module is raised in the import system; the reader wants the import statement.
    own = [frame for frame in frames if not frame.filename.startswith("<frozen importlib")]
    return f"{own[-1].filename}, line {own[-1].lineno}" if own else ""


def cause_and_consequences(error: BaseException) -> tuple[str, list[str]]:
    """The root cause as one sentence, then lines: where it was raised and what it led to."""
    chain = chain_of(error)
    place = raised_at(chain[0])
    lines = [f"raised in {place}"] if place else []
    lines += [f"which led to {describe(later)}" for later in chain[1:]]
    return describe(chain[0]), lines
