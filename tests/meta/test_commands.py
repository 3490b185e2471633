"""The two commands of the README are what continuous integration runs and what tox knows."""

from __future__ import annotations

import configparser
import os
import re

from tests.meta.tree import REPOSITORY


def readme_commands() -> list[str]:
    """The shell blocks of the README, in order."""
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    return [block.strip() for block in re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL)]


def test_the_readme_starts_with_two_commands_of_one_line() -> None:
    run, check = readme_commands()[:2]
    assert "\n" not in run
    assert "\n" not in check
    assert run.endswith('mortise generate "def fibonacci(n):"')
    assert check.endswith("tox run -e all")


def test_continuous_integration_runs_the_second_command() -> None:
    script = REPOSITORY / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert readme_commands()[1] in script.read_text(encoding="utf-8").splitlines()


def test_all_runs_every_verb_that_judges() -> None:
    tox = configparser.ConfigParser(interpolation=None)
    tox.read(REPOSITORY / "tox.ini", encoding="utf-8")
    judging = {"lint", "type", "meta", "docs", "test", "plugins", "pkg"}
    assert (
        set(re.findall(r"\{\[testenv:(\w+)\]commands\}", tox["testenv:all"]["commands"])) == judging
    )
    assert all(f"testenv:{verb}" in tox for verb in judging)


def test_every_verb_is_described_to_contributors() -> None:
    tox = configparser.ConfigParser(interpolation=None)
    tox.read(REPOSITORY / "tox.ini", encoding="utf-8")
    verbs = {name.removeprefix("testenv:") for name in tox.sections() if "testenv:" in name}
    text = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `([\w-]+)` \|", text, flags=re.MULTILINE)) == verbs - {"all"}
