"""Reading a JSON object from a model directory, with errors that say where in the file."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from mortise.errors import ModelConfigError

if TYPE_CHECKING:
    from pathlib import Path

DOWNLOAD_AGAIN = "download the file again from where the model was published"


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Raises:
        ModelConfigError: the file is not readable, not UTF-8, not JSON (with line and column), or
            holds something else than an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ModelConfigError(
            f"{path.name} cannot be read: {error.strerror}",
            details=[f"file: {path.absolute()}"],
            expected="a readable JSON file",
            remedy="correct the path or the file's permissions",
        ) from None
    except UnicodeDecodeError as error:
        raise ModelConfigError(
            f"{path.name} is not UTF-8 text: byte {error.start} is not valid",
            details=[f"file: {path.absolute()}"],
            expected="a JSON file",
            remedy=DOWNLOAD_AGAIN,
        ) from None
    except json.JSONDecodeError as error:
        raise ModelConfigError(
            f"{path.name} is not valid JSON at line {error.lineno}, column {error.colno}:"
            f" {error.msg}",
            details=[f"file: {path.absolute()}", *faulty_line(error)],
            expected="a JSON object",
            remedy=f"correct the file at that place, or {DOWNLOAD_AGAIN}",
        ) from None
    if not isinstance(content, dict):
        raise ModelConfigError(
            f"{path.name} holds a JSON {type(content).__name__}",
            details=[f"file: {path.absolute()}"],
            expected="a JSON object: { ... }",
            remedy=DOWNLOAD_AGAIN,
        )
    return content


def faulty_line(error: json.JSONDecodeError) -> list[str]:
    """The line the parser stopped at, if there is something to see in it."""
    lines = error.doc.splitlines()
    line = lines[error.lineno - 1].strip() if error.lineno <= len(lines) else ""
    return [f"line {error.lineno}: {line[:80]}"] if line else []
