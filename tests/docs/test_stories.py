"""Whoever follows a story notices what is not as the page says."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.docs.pages import DOCS, Block
from tests.docs.stories import STORIES, Reader, require_lines

if TYPE_CHECKING:
    from pathlib import Path


def run(line: str, directory: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", "-c", line], cwd=directory, capture_output=True, text=True, check=False
    )


def block(language: str, text: str, title: str = "") -> Block:
    return Block(page=DOCS / "index.md", line=1, language=language, title=title, text=text)


@pytest.fixture
def reader(tmp_path: Path) -> Reader:
    return Reader(tmp_path, run)


def test_a_story_is_a_page() -> None:
    assert STORIES
    assert all(page.is_file() for page in STORIES)


def test_commands_are_run_where_the_last_one_went(reader: Reader, tmp_path: Path) -> None:
    reader.follow(block("console", "$ mkdir inner\n$ cd inner\n$ echo one > file\n"))
    reader.follow(block("console", "$ cat file\n"))
    reader.follow(block("text", "one\n"))
    assert (tmp_path / "inner" / "file").is_file()


def test_another_exit_code_is_noticed(reader: Reader) -> None:
    reader.follow(block("console", "$ exit 1\n", "exit code 1"))
    for code, title in ((1, ""), (0, "exit code 1"), (2, "exit code 1")):
        with pytest.raises(AssertionError):
            reader.follow(block("console", f"$ exit {code}\n", title))


def test_a_file_is_written_or_must_be_so(reader: Reader, tmp_path: Path) -> None:
    reader.follow(block("toml", "a = 1\n", "deep/file.toml"))
    assert (tmp_path / "deep" / "file.toml").read_text() == "a = 1\n"
    reader.follow(block("toml", "a = 1\n", "deep/file.toml"))
    with pytest.raises(AssertionError, match="the file is different"):
        reader.follow(block("toml", "a = 2\n", "deep/file.toml"))


def test_an_edit_must_fit_in_one_place(reader: Reader, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("one\ntwo\nthree\n")
    reader.follow(block("diff", " one\n-two\n+2\n+2.5\n three\n", "file"))
    assert file.read_text() == "one\n2\n2.5\nthree\n"
    for text in (" one\n-two\n", "-2\n-three\n"):
        with pytest.raises(AssertionError, match="stands 0 times"):
            reader.follow(block("diff", text, "file"))
    file.write_text("one\none\n")
    with pytest.raises(AssertionError, match="stands 2 times"):
        reader.follow(block("diff", "-one\n+1\n", "file"))


def test_a_block_nobody_can_follow_is_noticed(reader: Reader) -> None:
    with pytest.raises(AssertionError, match="does not know what to do with python"):
        reader.follow(block("python", "print()\n"))


@pytest.mark.parametrize(
    "shown", ["one\nthree", "one\n...\nthree", "one\n...\ntwo", "two  three", "...", "tw..."]
)
def test_lines_are_found_in_order(shown: str) -> None:
    require_lines(shown, "one\n two\nthree\ntwo   three\n", "here")


@pytest.mark.parametrize("shown", ["three\none", "tw", "one two", "one\none", "wo..."])
def test_other_lines_are_not_found(shown: str) -> None:
    with pytest.raises(AssertionError, match="is not in the output"):
        require_lines(shown, "one\n two\nthree\n", "here")
