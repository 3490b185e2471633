"""Running the command line in this process, and taking its output apart."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from click.testing import CliRunner

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
    """Run one command line; variables of the environment hold while it runs."""
    environment = {"MORTISE_CONFIG": None, "SGLANG_DEEPEP_BF16_DISPATCH": None} | variables
    result = CliRunner(env=environment).invoke(
        command_tree(), [str(argument) for argument in arguments], input=stdin, prog_name="mortise"
    )
    return Outcome(result.exit_code, result.stdout, result.stderr)


def failure(*arguments: str | Path, **variables: str) -> str:
    """The message of a command line that must fail as a user's mistake does."""
    outcome = mortise(*arguments, **variables)
    assert outcome.code == 2, outcome
    assert outcome.stdout == ""
    assert "Traceback" not in outcome.stderr
    assert outcome.stderr.startswith("error: "), outcome.stderr
    return outcome.stderr
