"""The verb ``doctor``: whether this installation works, check by check."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from mortise.cli.options import configuration_options, json_option
from mortise.cli.output import document, print_json, results

if TYPE_CHECKING:
    from mortise.spec.doctor import Finding


@click.command(short_help="Check the installation.")
@configuration_options
@json_option
def doctor(as_json: bool, **options: Any) -> int:
    """Check Python, torch, the configuration, the backends, the model and the terminal.

    The backend that the configuration names is asked for findings of its own; no code of another
    one runs. The exit code is 1 if a check failed, otherwise 0.
    """
    from mortise.cli.checks import run_checks
    from mortise.spec.doctor import Verdict

    checks = list(run_checks(options))
    failed = any(check.verdict is Verdict.FAIL for check in checks)
    if as_json:
        print_json(document(ok=not failed, checks=[_fields(check) for check in checks]))
    else:
        _show(checks)
    return int(failed)


def _fields(check: Finding) -> dict[str, Any]:
    return {
        "name": check.name,
        "verdict": check.verdict.value,
        "found": check.found,
        "remedy": check.remedy,
    }


def _show(checks: list[Finding]) -> None:
    from rich.text import Text

    from mortise.spec.doctor import Verdict

    styles = {Verdict.OK: "green", Verdict.NOTE: "cyan", Verdict.WARN: "yellow"}
    width = max(len(check.name) for check in checks)
    console = results()
    for check in checks:
        style = styles.get(check.verdict, "bold red")
        line = Text.assemble(
            (f"{check.verdict.value:<5}", style), f"{check.name:<{width}}  {check.found}"
        )
        console.print(line, soft_wrap=True)
        if check.remedy:
            console.print(f"{'':<{width + 7}}remedy: {check.remedy}", markup=False, soft_wrap=True)
