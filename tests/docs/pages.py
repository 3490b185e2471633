"""The fenced blocks of every page, with the place where each stands."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
DOCS = REPOSITORY / "docs"
FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>\w+)?(?: title=\"(?P<title>[^\"]*)\")?\n"
    r"(?P<text>.*?)^(?P=indent)```$",
    flags=re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class Block:
    """One fenced block: ``console``, ``toml``, ``python`` ...; its title; its text; its place."""

    page: Path
    line: int
    language: str
    title: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(REPOSITORY).as_posix()}:{self.line}"


@cache
def pages() -> tuple[Path, ...]:
    """Every page that users read."""
    readmes = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md"]
    readmes += [*REPOSITORY.glob("core/README.md"), *REPOSITORY.glob("plugins/*/README.md")]
    return tuple(sorted([*DOCS.rglob("*.md"), *readmes]))


@cache
def blocks(language: str) -> tuple[Block, ...]:
    """Every block of one language, in the order of the pages."""
    return tuple(
        block for page in pages() for block in blocks_of(page) if block.language == language
    )


def blocks_of(page: Path) -> list[Block]:
    """Every fenced block of one page."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(
            page=page,
            line=text.count("\n", 0, match.start()) + 1,
            language=match["language"] or "",
            title=match["title"] or "",
            text=match["text"],
        )
        for match in FENCE.finditer(text)
    ]


def commands(block: Block) -> list[str]:
    """The command lines of a console block; a backslash continues one."""
    joined = block.text.replace("\\\n", "")
    return [
        line.strip().removeprefix("$ ")
        for line in joined.splitlines()
        if line.strip().startswith("$ ")
    ]


def expected_code(block: Block) -> int:
    match = re.fullmatch(r"exit code (\d)", block.title)
    return int(match[1]) if match else 0
