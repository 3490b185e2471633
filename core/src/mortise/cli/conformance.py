"""The verb ``conformance``: ask a backend whether it keeps the contract of the hooks."""

from __future__ import annotations

import importlib.util
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mortise.cli.options import json_option
from mortise.cli.output import document, print_json, results, table
from mortise.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from mortise.backends.verdict import ConformanceVerdict

LEVELS = ("static", "host", "device")


@click.command(short_help="Check that a backend keeps the contract.")
@click.argument("name")
@click.option("--device", metavar="TEXT", help="Device, in the backend's own words.")
@click.option(
    "--level",
    "levels",
    type=click.Choice(LEVELS),
    multiple=True,
    help="Ask this level alone; may be given again.  [default: all]",
)
@click.option(
    "--option",
    "options",
    metavar="KEY=VALUE",
    multiple=True,
    help="An entry of the backend's own table of the configuration; may be given again.",
)
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Write the verdict there, as JSON.",
)
@click.option(
    "-k",
    "keyword",
    default="",
    metavar="EXPR",
    help="Ask only checks whose name matches, as pytest's -k does.",
)
@json_option
def conformance(
    name: str,
    device: str | None,
    levels: tuple[str, ...],
    options: tuple[str, ...],
    output: Path | None,
    keyword: str,
    as_json: bool,
) -> int:
    """Ask the backend NAME everything that it claims to serve.

    Hooks are compared with the reference, on the backend's device or on `--device emulated`. The
    exit code is 1 if a check failed, otherwise 0.
    """
    _require_pytest()
    from mortise.conformance.options import option_table
    from mortise.conformance.records import Level
    from mortise.conformance.session import run_conformance
    from mortise.conformance.subject import Subject

    subject = Subject(name, device, option_table(options))
    asked = tuple(Level(level) for level in levels or LEVELS)
    verdict = run_conformance(subject, asked, keyword)
    if output is not None:
        _write(output, verdict)
    if as_json:
        print_json(document(**verdict.model_dump(mode="json", exclude={"schema_version"})))
    else:
        show_verdict(results(), verdict)
    return int(bool(verdict.failed))


def _require_pytest() -> None:
    if importlib.util.find_spec("pytest") is None:
        raise ConfigError(
            "the conformance kit runs in pytest, which is not installed",
            remedy="install mortise-core[conformance]",
        )


def _write(path: Path, verdict: ConformanceVerdict) -> None:
    try:
        path.write_text(verdict.to_json(), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"the verdict cannot be written to {path}: {error.strerror}") from error


def show_verdict(console: Console, verdict: ConformanceVerdict) -> None:
    """Who was examined, a row for each level, the worst errors, what was skipped, what failed."""
    emulated = ", emulated" if verdict.emulated else ""
    where = f", on {verdict.device}{emulated}" if verdict.device else ""
    who = f"{verdict.backend} ({verdict.distribution} {verdict.version}){where}"
    console.print(f"{who}, kit {verdict.kit}\n", markup=False)
    console.print(_levels(verdict))
    if verdict.worst:
        console.print()
        console.print(_errors(verdict))
    _show_skipped(console, verdict)
    for one in verdict.failed:
        console.print(
            f"\nFAILED {one.check}\n{_indented(one.reason)}", markup=False, soft_wrap=True
        )
    console.print(f"\n{verdict.in_words()}", markup=False)


def _levels(verdict: ConformanceVerdict) -> Any:
    return table(
        ("level", "passed", "failed", "skipped"),
        [
            (level, str(counts.passed), str(counts.failed), str(counts.skipped))
            for level, counts in verdict.levels.items()
        ],
    )


def _errors(verdict: ConformanceVerdict) -> Any:
    return table(
        ("worst error of", "relative", "allowed"),
        [
            (subject, f"{worst.error:.2g}", f"{worst.tolerance:.2g}")
            for subject, worst in verdict.worst.items()
        ],
    )


def _show_skipped(console: Console, verdict: ConformanceVerdict) -> None:
    """Each reason once, the most frequent first."""
    reasons = Counter(one.reason.splitlines()[0] for one in verdict.skipped)
    if reasons:
        console.print()
        console.print(
            table(("skipped", "because"), [(str(n), why) for why, n in reasons.most_common()])
        )


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())
