"""Texts to be predicted: of a file, or those kept out of the built-in model's training."""

from __future__ import annotations

import importlib.resources
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mortise.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mortise.checkpoint import Tokenizer

TEXT_FILE = "text.jsonl"
NGRAMS_FILE = "ngrams.safetensors"
EXPECTED = 'a UTF-8 text, or with the ending .jsonl one {"text": "..."} a line'


@dataclass(frozen=True, slots=True)
class Document:
    """A text and where it came from."""

    name: str
    text: str

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of the text."""
        return len(self.text.encode())

    def token_ids(self, tokenizer: Tokenizer) -> list[int]:
        """The text between the tokens for its beginning and its end, where there are such."""
        first, last = tokenizer.bos_token_id, tokenizer.eos_token_id
        return [
            *([] if first is None else [first]),
            *tokenizer.encode(self.text, add_special_tokens=False),
            *([] if last is None else [last]),
        ]


def held_out_directory() -> Path:
    """Where the installation has the texts that the built-in model was not trained on."""
    return Path(str(importlib.resources.files("mortise") / "assets" / "stdlib-heldout"))


def read_documents(path: Path) -> list[Document]:
    """The texts of a file: one of a text file, one a line of a ``.jsonl`` file.

    Raises:
        RequestError: the file cannot be read, holds no text, or a line is not as expected.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(
            f"the text {str(path)!r} cannot be read: {error}",
            expected=EXPECTED,
            remedy="correct the path or the file",
        ) from None
    found = list(_lines(path, text)) if path.suffix == ".jsonl" else [Document(path.name, text)]
    found = [document for document in found if document.text]
    if not found:
        raise RequestError(
            f"the text {str(path)!r} is empty", expected=EXPECTED, remedy="give another file"
        )
    return found


def _lines(path: Path, text: str) -> Iterator[Document]:
    # Not splitlines: a text may hold other characters that Python takes for line ends.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield _document(line, f"{path.name}, line {number}")


def _document(line: str, place: str) -> Document:
    problem = f"holds {line[:60]}"
    try:
        value: Any = json.loads(line)
    except json.JSONDecodeError as error:
        value, problem = None, f"not JSON: {error}"
    if isinstance(value, dict) and isinstance(value.get("text"), str):
        return Document(str(value.get("path", place)), value["text"])
    raise RequestError(f"{place}: {problem}", expected=EXPECTED, remedy="correct the line")


def total_bytes(documents: Sequence[Document]) -> int:
    """UTF-8 bytes of all texts."""
    return sum(document.num_bytes for document in documents)
