"""Builds the training text, CPython's library sources and documentation, and its held-out part.

    python -m training.corpus OUTPUT [--documentation SOURCES]

Whole files are held out, chosen by the sha256 of their path, so the split is the same on every
machine. No held-out text is a copy, or mostly made of lines, of a file that is trained on.
"""

from __future__ import annotations

import hashlib
import json
import re
import sysconfig
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

import click

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

Kind = Literal["library", "test", "documentation"]

EXCLUDED_PATHS: Final = re.compile(
    r"(^|/)(site-packages|__pycache__|idle_test|ensurepip|pydoc_data)/"
    r"|^lib2to3/tests/|^config-"
    r"|^encodings/(cp|mac_|iso8859|koi8|ptcp|hp_|tis_|kz|aliases)"
    r"|^test/(encoded_modules|cjkencodings|bad)|^test/test_lib2to3"
)
TEST_PATHS: Final = re.compile(r"(^|/)tests?/|(^|/)test_[^/]*$")

MAXIMUM_BYTES: Final[dict[Kind, int]] = {
    "library": 250_000,
    "test": 64_000,
    "documentation": 400_000,  # the largest hand-written page is 212 kB
}
TEST_BUDGET_BYTES: Final = 5_000_000  # tests read alike; more of them would crowd out the rest

HELD_OUT_SHARE: Final = 0.03
HELD_OUT_BYTES: Final[dict[Kind, int]] = {
    "library": 160_000,
    "test": 60_000,
    "documentation": 180_000,
}
HELD_OUT_FILE_BYTES: Final = 60_000  # no single file may dominate the measure
LONG_LINE: Final = 24  # characters; shorter lines repeat everywhere in honest text
SHARED_LINES_LIMIT: Final = 0.5


@dataclass(frozen=True, slots=True)
class Document:
    """One file: its path below `Lib/` or `Doc/`, its kind and its text with Unix line ends."""

    path: str
    kind: Kind
    text: str


@dataclass(frozen=True, slots=True)
class Split:
    """The corpus in two disjoint parts, each in order of path rank, which mixes the kinds."""

    train: tuple[Document, ...]
    held_out: tuple[Document, ...]


def normalise(text: str) -> str:
    """Return `text` with Unix line ends, no byte order mark and exactly one final line end."""
    unix = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    return unix.strip("\n") + "\n"


def is_mostly_data(text: str) -> bool:
    """Tell whether `text` is a table rather than prose or code: digits, escapes, long lines."""
    if not text.strip():
        return True
    digits = sum(character.isdigit() for character in text)
    escapes = 2 * text.count("\\x") + 2 * text.count("\\u") + text.count("0x")
    foreign = sum(not character.isascii() for character in text)
    longest = max(len(line) for line in text.split("\n"))
    return digits + escapes > 0.18 * len(text) or foreign > 0.05 * len(text) or longest > 2_000


def path_rank(path: str) -> float:
    """Return a number in [0, 1) that depends on `path` alone."""
    return int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "big") / 2**64


def read_document(file: Path, path: str, kind: Kind) -> Document | None:
    """Return the document at `file`, or None if it is not UTF-8, too large or mostly data."""
    data = file.read_bytes()
    if len(data) > MAXIMUM_BYTES[kind]:
        return None
    try:
        text = normalise(data.decode("utf-8"))
    except UnicodeDecodeError:
        return None
    return None if is_mostly_data(text) else Document(path, kind, text)


def library_documents(root: Path) -> Iterator[Document]:
    """Yield the `.py` files below the library directory `root`, tests among them."""
    for file in sorted(root.rglob("*.py")):
        path = file.relative_to(root).as_posix()
        if EXCLUDED_PATHS.search(path):
            continue
        kind: Kind = "test" if TEST_PATHS.search(path) else "library"
        document = read_document(file, f"Lib/{path}", kind)
        if document is not None:
            yield document


def documentation_documents(root: Path) -> Iterator[Document]:
    """Yield the `.rst.txt` files below `root`, the `_sources` of the built documentation."""
    for file in sorted(root.rglob("*.rst.txt")):
        path = file.relative_to(root).as_posix().removesuffix(".txt")
        document = read_document(file, f"Doc/{path}", "documentation")
        if document is not None:
            yield document


def without_duplicates(documents: Iterable[Document]) -> list[Document]:
    """Return the documents sorted by path; of equal texts only the first remains."""
    by_digest: dict[bytes, Document] = {}
    for document in sorted(documents, key=lambda document: document.path):
        by_digest.setdefault(hashlib.sha256(document.text.encode()).digest(), document)
    return list(by_digest.values())


def with_test_budget(documents: Sequence[Document], budget_bytes: int) -> list[Document]:
    """Return all but those tests that, taken in order of their rank, exceed `budget_bytes`."""
    kept: set[str] = set()
    total = 0
    tests = [document for document in documents if document.kind == "test"]
    for document in sorted(tests, key=lambda document: path_rank(document.path)):
        total += len(document.text.encode())
        if total > budget_bytes:
            break
        kept.add(document.path)
    return [document for document in documents if document.kind != "test" or document.path in kept]


def long_lines(text: str) -> set[str]:
    """Return the distinct lines of `text` that are long enough to be telling."""
    return {line.strip() for line in text.split("\n") if len(line.strip()) >= LONG_LINE}


def shared_lines_share(document: Document, files_with_line: Counter[str]) -> float:
    """Return the share of the document's long lines that other files have too."""
    lines = long_lines(document.text)
    shared = sum(files_with_line[line] > 1 for line in lines)
    return shared / len(lines) if lines else 1.0


def held_out_paths(documents: Sequence[Document], share: float = HELD_OUT_SHARE) -> set[str]:
    """Return the paths to hold out: rank below `share`, within each kind's budget, no near copy."""
    files_with_line = Counter(line for doc in documents for line in long_lines(doc.text))
    remaining = dict(HELD_OUT_BYTES)
    chosen: set[str] = set()
    for document in sorted(documents, key=lambda document: path_rank(document.path)):
        if path_rank(document.path) >= share:
            break
        size = len(document.text.encode())
        if size > min(HELD_OUT_FILE_BYTES, remaining[document.kind]):
            continue
        if shared_lines_share(document, files_with_line) > SHARED_LINES_LIMIT:
            continue
        chosen.add(document.path)
        remaining[document.kind] -= size
    return chosen


def build(documents: Iterable[Document], share: float = HELD_OUT_SHARE) -> Split:
    """Return the split corpus: duplicates dropped, tests limited, held-out files set apart."""
    kept = with_test_budget(without_duplicates(documents), TEST_BUDGET_BYTES)
    chosen = held_out_paths(kept, share)
    kept.sort(key=lambda document: path_rank(document.path))
    return Split(
        train=tuple(document for document in kept if document.path not in chosen),
        held_out=tuple(document for document in kept if document.path in chosen),
    )


def write_jsonl(documents: Sequence[Document], file: Path) -> str:
    """Write one `{"path", "text"}` object a line and return the file's sha256."""
    lines = (json.dumps({"path": d.path, "text": d.text}, ensure_ascii=False) for d in documents)
    data = "".join(f"{line}\n" for line in lines).encode()
    file.write_bytes(data)
    return hashlib.sha256(data).hexdigest()


def read_jsonl(file: Path) -> Iterator[tuple[str, str]]:
    """Yield (path, text) of each document in a file that `write_jsonl` wrote."""
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            entry = json.loads(line)
            yield entry["path"], entry["text"]


def summary(documents: Sequence[Document]) -> dict[str, int]:
    """Return the number of files and of bytes for each kind of document."""
    counts: Counter[str] = Counter()
    for document in documents:
        counts[f"{document.kind}_files"] += 1
        counts[f"{document.kind}_bytes"] += len(document.text.encode())
        counts["bytes"] += len(document.text.encode())
    return dict(sorted(counts.items()))


@click.command()
@click.argument("output", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--library",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=lambda: sysconfig.get_path("stdlib"),
    help="Library directory of the interpreter whose sources to take; default: this one's.",
)
@click.option(
    "--documentation",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Directory of .rst.txt sources; Debian's python3.11-doc has them.",
)
def main(output: Path, library: Path, documentation: Path | None) -> None:
    """Write OUTPUT/train.jsonl, OUTPUT/held_out.jsonl and OUTPUT/corpus.json."""
    documents = list(library_documents(library.resolve()))
    if documentation is not None:
        documents += documentation_documents(documentation.resolve())
    split = build(documents)
    output.mkdir(parents=True, exist_ok=True)
    parts = {"train": split.train, "held_out": split.held_out}
    facts = {
        name: {"sha256": write_jsonl(part, output / f"{name}.jsonl"), **summary(part)}
        for name, part in parts.items()
    }
    (output / "corpus.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    click.echo(json.dumps(facts, indent=2))


if __name__ == "__main__":
    main()
