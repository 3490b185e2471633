"""Every page that is one story is followed, by somebody who has only what it tells to install."""

from __future__ import annotations

import os
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.docs.pages import blocks_of
from tests.docs.stories import STORIES, Reader
from tests.pkg.installation import REPOSITORY, CleanEnvironment, build_wheels, variables

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("page", STORIES, ids=lambda page: page.stem)
def test_a_story_is_true(page: Path, tmp_path: Path) -> None:
    environment = CleanEnvironment(tmp_path / "environment")
    environment.install(build_wheels([REPOSITORY / "core"], tmp_path / "wheels").values())
    scripts = f"{environment.python.parent}{os.pathsep}{os.environ['PATH']}"

    def run(line: str, directory: Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "-c", line],
            cwd=directory,
            env={**variables(), "PATH": scripts, "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
            capture_output=True,
            text=True,
            check=False,
        )

    (tmp_path / "empty").mkdir()
    reader = Reader(tmp_path / "empty", run)
    blocks = blocks_of(page)
    assert [block for block in blocks if block.language == "console"]
    for block in blocks:
        reader.follow(block)
