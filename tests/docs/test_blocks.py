"""Every command, configuration and program that the documentation shows is run.

- ``console``: each line that starts with ``$ `` is run in a shell, in an empty directory that holds
  the titled blocks of the same page as files; it must end with exit code 0, or with the one that
  the block's title names (``exit code 2``).
- ``toml``: a title that ends in ``backend.toml`` is a manifest, anything else an engine
  configuration.
- ``python``: a program, run in that same directory.
- ``sh``: commands that install something; continuous integration runs the README's.
- ``py``: a signature or a fragment; other tests compare it with the code.

Pages that are one story are followed by ``tests/pkg`` instead: their commands install something.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mortise import EngineConfig
from mortise.backends.manifest import parse_manifest
from tests.docs.pages import Block, blocks, blocks_of, commands, expected_code, pages
from tests.docs.stories import STORIES

LANGUAGES = {"", "console", "diff", "json", "py", "python", "sh", "text", "toml"}


def write_files(page: Path, directory: Path) -> None:
    """The titled blocks of a page, as the files that its commands read."""
    for block in blocks_of(page):
        if block.title and not block.title.startswith("exit code"):
            path = directory / block.title
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text, encoding="utf-8")


def run(arguments: list[str], directory: Path) -> subprocess.CompletedProcess[str]:
    scripts = str(Path(sys.executable).parent)
    environment = {
        name: text for name, text in os.environ.items() if not name.startswith("MORTISE_")
    }
    environment |= {"PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}", "HOME": str(directory)}
    return subprocess.run(
        arguments, cwd=directory, env=environment, capture_output=True, text=True, check=False
    )


def test_pages_use_known_languages() -> None:
    found = {(str(block), block.language) for page in pages() for block in blocks_of(page)}
    assert {language for _, language in found} <= LANGUAGES, found


def alone(language: str) -> list[Block]:
    """The blocks of one language that are run by themselves."""
    return [block for block in blocks(language) if block.page not in STORIES]


@pytest.mark.parametrize("block", alone("console"), ids=str)
def test_commands_run(block: Block, tmp_path: Path) -> None:
    write_files(block.page, tmp_path)
    lines = commands(block)
    assert lines, "a console block shows at least one command"
    for line in lines:
        outcome = run(["bash", "-c", line], tmp_path)
        assert outcome.returncode == expected_code(block), (
            f"$ {line}\n{outcome.stdout}{outcome.stderr}"
        )
        assert "Traceback" not in outcome.stderr


@pytest.mark.parametrize("block", alone("toml"), ids=str)
def test_configurations_parse(block: Block, tmp_path: Path) -> None:
    if block.title.endswith("backend.toml"):
        parse_manifest(block.text)
        return
    path = tmp_path / "engine.toml"
    path.write_text(block.text, encoding="utf-8")
    EngineConfig.from_toml(path)


@pytest.mark.parametrize("block", alone("python"), ids=str)
def test_programs_run(block: Block, tmp_path: Path) -> None:
    write_files(block.page, tmp_path)
    outcome = run([sys.executable, "-W", "error", "-c", block.text], tmp_path)
    assert outcome.returncode == 0, outcome.stderr
