"""The verb ``warmup``: compile ahead of time what a model is going to use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from mortise.cli.options import configuration_options, json_option, resolve_options
from mortise.cli.output import document, print_json, results, table

if TYPE_CHECKING:
    from mortise.engine.llm import LLM
    from mortise.engine.warmup import WarmupReport


@click.command(short_help="Compile ahead of time what a model needs.")
@configuration_options
@json_option
def warmup(as_json: bool, **options: Any) -> None:
    """Load the model and compile everything that its backend compiles for it.

    A start of the engine compiles what is missing before it is ready; after this, with the same
    options, nothing is. Shown is each thing that was compiled, with its seconds.
    """
    from mortise.cli.session import load_llm, warm

    llm = load_llm(resolve_options(options), warm_up=False)
    report = warm(llm, ahead=True)
    if as_json:
        print_json(_document(llm, report))
        return
    _show(llm, report)


def _document(llm: LLM, report: WarmupReport) -> dict[str, Any]:
    return document(
        model=str(llm.loaded.directory.path),
        backend=llm.loaded.bound.row.name,
        device=str(llm.loaded.device),
        threads=report.threads,
        seconds=report.seconds,
        jobs=[{"name": job.name, "seconds": job.seconds} for job in report.jobs],
    )


def _show(llm: LLM, report: WarmupReport) -> None:
    console, name = results(), llm.loaded.bound.row.name
    if not report.jobs:
        console.print(f"backend {name!r} has nothing to compile for this model", markup=False)
        return
    rows = [(job.name, f"{job.seconds:.2f}") for job in report.jobs]
    console.print(table(("compiled", "seconds"), rows))
    total = f"{len(rows)} in {report.seconds:.2f} s, {report.threads} at a time"
    console.print(total, markup=False)
