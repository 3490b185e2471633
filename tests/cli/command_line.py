"""Running the command line in this process, and taking its output apart."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner

from mortise import env
from mortise.cli import command_tree

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True)
class Outcome:
    code: int
    stdout: str
    stderr: str

    @property
    def document(self) -> dict[str, Any]:
        """What ``--json`` printed on standard output."""
        return json.loads(self.stdout)


def mortise(*arguments: str | Path, stdin: str | bytes = "", **variables: str) -> Outcome:
    """Run one command line; it reads these variables instead of the process's environment."""
    texts = [str(argument) for argument in arguments]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(env, "read_environment", partial(env.read_environment, variables))
        result = CliRunner().invoke(command_tree(), texts, input=stdin, prog_name="mortise")
    return Outcome(result.exit_code, result.stdout, result.stderr)


def failure(*arguments: str | Path, **variables: str) -> str:
    """The message of a command line that must fail as a user's mistake does."""
    outcome = mortise(*arguments, **variables)
    assert outcome.code == 2, outcome
    assert outcome.stdout == ""
    assert "Traceback" not in outcome.stderr
    assert outcome.stderr.startswith("error: "), outcome.stderr
    return outcome.stderr
