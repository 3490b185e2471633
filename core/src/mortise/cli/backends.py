"""The verb ``backends``: what is installed, how far each backend came, and why no further."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from mortise.cli.options import json_option
from mortise.cli.output import document, print_json, results, table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mortise.backends import Candidate
    from mortise.backends.verdict import ConformanceVerdict


@click.command(short_help="List the installed backends.")
@click.option(
    "--probe",
    is_flag=True,
    help="Also ask each backend for its device and libraries, in a process of its own.",
)
@json_option
def backends(probe: bool, as_json: bool) -> None:
    """List the installed hardware backends and whether each can be used.

    Package metadata and manifests are read as text; no code of a backend runs, and no device is
    touched, unless `--probe` asks for it. `mortise doctor` looks closer.
    """
    from mortise.backends import discover_backends, probe_backends

    rows = discover_backends()
    if probe:
        rows = probe_backends(rows)
    if as_json:
        print_json(document(backends=[backend_fields(row) for row in rows]))
        return
    show_backends(rows)


def backend_fields(row: Candidate) -> dict[str, Any]:
    """One backend as JSON."""
    manifest, verdict = row.manifest, shown_verdict(row)
    return {
        "name": row.name,
        "distribution": row.distribution,
        "version": row.version,
        "usable": row.usable,
        "stage": row.stage.value,
        "reason": None if row.reason is None else row.reason.value,
        "explanation": row.explanation,
        "remedy": row.remedy,
        "notes": list(row.notes),
        "summary": None if manifest is None else manifest.summary,
        "engine": None if manifest is None else manifest.engine,
        "hooks": {} if manifest is None else dict(manifest.implements),
        "emulation": None if manifest is None else manifest.capabilities.emulation,
        "gaps": [] if manifest is None else list(manifest.gaps),
        "conformance": None if isinstance(verdict, str | None) else verdict.in_words(),
        "manifest": row.manifest_path,
        "location": row.location,
    }


def show_backends(rows: Sequence[Candidate]) -> None:
    """A table, then what is to be said about those that cannot be used."""
    console = results()
    console.print(
        table(
            ("backend", "distribution", "status", "hooks", "place"),
            [
                (
                    row.name,
                    f"{row.distribution} {row.version}",
                    "usable" if row.reason is None else row.reason.value,
                    hooks_text(row),
                    row.manifest_path or row.location,
                )
                for row in rows
            ],
        )
    )
    for row in rows:
        for line in remarks(row):
            console.print(f"\n{row.name}: {line}", markup=False, soft_wrap=True)


def hooks_text(row: Candidate) -> str:
    """The hooks of a backend with their versions."""
    from mortise.spec.hooks import HOOKS

    implements = {} if row.manifest is None else row.manifest.implements
    if implements == {name: spec.version for name, spec in HOOKS.items()}:
        return f"all {len(HOOKS)}"
    return ", ".join(f"{name} {version}" for name, version in implements.items()) or "none"


def remarks(row: Candidate) -> list[str]:
    """Why a backend cannot be used, what to do, and other news."""
    lines = [*row.notes, *said_of_conformance(row)]
    if row.reason is None and row.explanation:
        lines.insert(0, row.explanation)
    if row.reason is not None:
        remedy = f"\n  remedy: {row.remedy}" if row.remedy else ""
        lines.insert(0, f"{row.explanation}{remedy}")
    return lines


def shown_verdict(row: Candidate) -> ConformanceVerdict | str | None:
    """The verdict that the distribution ships, or why it cannot be read, if it ships one."""
    from mortise.backends.verdict import shipped_verdict
    from mortise.errors import ConfigError

    try:
        return shipped_verdict(row)
    except ConfigError as error:
        return error.what


def said_of_conformance(row: Candidate) -> list[str]:
    """What the conformance kit found, and for what else than what is installed."""
    from mortise.backends.verdict import differences_of

    verdict = shown_verdict(row)
    if verdict is None:
        return []
    if isinstance(verdict, str):
        return [verdict]
    others = differences_of(verdict, row)
    return [verdict.in_words() + (f" (it was for {', '.join(others)})" if others else "")]
