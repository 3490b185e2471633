"""Pages that are one story: a reader follows their blocks in order, in one directory.

- ``console``: the commands are run; ``cd`` is remembered.
- ``text`` without a title: its lines stand in the output of the commands before it, in this order,
  blanks aside; ``...`` stands for any lines.
- a block with a title is that file: written where it is not there, else it must be so already.
- ``diff``: the file of its title is edited; the lines before must stand in it exactly once.
- ``sh``: commands for a machine without an environment; not run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.docs.pages import DOCS, commands, expected_code

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable
    from pathlib import Path

    from tests.docs.pages import Block

STORIES = (DOCS / "tutorials" / "write-a-backend-in-30-minutes.md",)


class Reader:
    """Somebody who does what a page says.

    Args:
        directory: where they begin.
        run: runs one line in a directory, as a shell does.
    """

    def __init__(
        self, directory: Path, run: Callable[[str, Path], subprocess.CompletedProcess[str]]
    ) -> None:
        self.directory = directory
        self.run = run
        self.output = ""

    def follow(self, block: Block) -> None:
        """Do what one block says."""
        match block.language, block.title:
            case "console", _:
                self.output = "".join(self._type(line, block) for line in commands(block))
            case "diff", title:
                self._edit(self.directory / title, block)
            case "text", "":
                require_lines(block.text, self.output, str(block))
            case "sh", "":
                pass
            case language, title:
                assert title, f"{block}: a reader does not know what to do with {language}"
                self._file(self.directory / title, block)

    def _type(self, line: str, block: Block) -> str:
        if line.startswith("cd "):
            self.directory /= line.removeprefix("cd ")
            assert self.directory.is_dir(), f"{block}: {line}"
            return ""
        outcome = self.run(line, self.directory)
        output = outcome.stdout + outcome.stderr
        assert outcome.returncode == expected_code(block), f"{block}: $ {line}\n{output}"
        assert "Traceback" not in output, f"{block}: $ {line}\n{output}"
        return output

    def _file(self, path: Path, block: Block) -> None:
        if path.exists():
            assert path.read_text(encoding="utf-8") == block.text, f"{block}: the file is different"
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block.text, encoding="utf-8")

    def _edit(self, path: Path, block: Block) -> None:
        lines = block.text.splitlines()
        before = "".join(f"{line[1:]}\n" for line in lines if not line.startswith("+"))
        after = "".join(f"{line[1:]}\n" for line in lines if not line.startswith("-"))
        text = path.read_text(encoding="utf-8")
        assert text.count(before) == 1, f"{block}: stands {text.count(before)} times in {path.name}"
        path.write_text(text.replace(before, after), encoding="utf-8")


def require_lines(shown: str, output: str, where: str) -> None:
    """Require that lines stand in an output in this order; ``...`` leaves lines or an end out."""
    found = iter([" ".join(line.split()) for line in output.splitlines()])
    for line in shown.splitlines():
        wanted = " ".join(line.split())
        begins, dots, _ = wanted.partition("...")
        if begins:
            there = any(one.startswith(begins) if dots else one == wanted for one in found)
            assert there, f"{where}: {wanted!r} is not in the output:\n{output}"
