"""Prompts from the command line, from standard input and from files."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mortise.cli.output import messages
from mortise.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    Given = str | list[int]
    """A text, or token ids."""

LINE_EXPECTED = 'a text in quotes, {"prompt": "..."} or {"token_ids": [1, 2]}'


def read_prompts(
    prompt: str | None, prompts: Sequence[str], prompts_file: str | None
) -> list[Given]:
    """Every prompt that was given, in the order argument, options, file; else standard input.

    Raises:
        RequestError: the file or a line of it cannot be read, or a text is not UTF-8.
    """
    found: list[Given] = []
    if prompt is not None:
        found.append(_standard_input() if prompt == "-" else _argument(prompt))
    found += map(_argument, prompts)
    if prompts_file is not None:
        found += read_jsonl(Path(prompts_file))
    return found or [_standard_input()]


def read_jsonl(path: Path) -> Iterator[Given]:
    """The prompts of a file with one JSON value a line; empty lines are left out.

    Raises:
        RequestError: names the file, the line and what it holds.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(
            f"the file of prompts {str(path)!r} cannot be read: {error}",
            expected="a UTF-8 file with one prompt a line, as JSON",
            remedy="correct the path or the file",
        ) from None
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield _prompt_of_line(line, f"{path}, line {number}")


def _prompt_of_line(line: str, place: str) -> Given:
    try:
        value: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise RequestError(
            f"{place}: not JSON: {error}", expected=LINE_EXPECTED, remedy="correct the line"
        ) from None
    match value:
        case str():
            return value
        case {"prompt": str(text), **rest} if not rest:
            return text
        case {"token_ids": [*token_ids], **rest} if not rest and _are_integers(token_ids):
            return token_ids
    raise RequestError(
        f"{place}: holds {line.strip()[:60]}", expected=LINE_EXPECTED, remedy="correct the line"
    )


def _are_integers(values: list[Any]) -> bool:
    return all(isinstance(value, int) and not isinstance(value, bool) for value in values)


def _argument(text: str) -> str:
    """An argument read as UTF-8, whatever the locale made of its bytes."""
    return _decoded(os.fsencode(text), "the prompt")


def _standard_input() -> str:
    if sys.stdin.isatty():
        messages().print("Type the prompt; end it with Ctrl-D on a line of its own.", style="dim")
    return _decoded(sys.stdin.buffer.read(), "standard input")


def _decoded(data: bytes, what: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise RequestError(
            f"{what} is not UTF-8 text: byte {error.start} is not valid",
            expected="UTF-8 text",
            remedy="convert it, for example with iconv",
        ) from None
