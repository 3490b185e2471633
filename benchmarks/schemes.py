"""What quantising costs in accuracy: ``mortise eval --schemes all`` on the whole held-out text."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from benchmarks.report import report, save

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

PICTURE = Path(__file__).parents[1] / "docs" / "reference" / "accuracy.svg"
COMMAND = ("eval", "--schemes", "all")
COLUMNS = (
    "scheme",
    "bits/weight",
    "perplexity",
    "bits/byte",
    "same likeliest token",
    "KL divergence, nats",
)
# The whole text twice, and so little of it that a test can measure it again.
EXCERPT = ("--documents", "1", "--window", "256")
RUNS = ((), ("--dtype", "float32"), EXCERPT)


def measure(*arguments: str, plot: Path | None) -> dict[str, Any]:
    """One run of the command, and the document that it printed."""
    drawn = [] if plot is None else ["--plot", str(plot)]
    outcome = subprocess.run(
        [sys.executable, "-m", "mortise", *COMMAND, *arguments, *drawn, "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    if outcome.returncode:
        raise click.ClickException(outcome.stderr)
    found = json.loads(outcome.stdout)
    # Where the package is installed says nothing to a reader.
    found["text"] = Path(found["text"]).relative_to(Path(found["text"]).parents[1]).as_posix()
    return {"command": " ".join(["mortise", *COMMAND, *arguments]), **found}


def markdown(run: Mapping[str, Any]) -> Iterator[str]:
    """The scores of one run as lines of a table, the model itself first."""
    yield f"| {' | '.join(COLUMNS)} |"
    yield f"|---{'|---:' * (len(COLUMNS) - 1)}|"
    for score in run["scores"]:
        yield f"| {' | '.join(cells(score))} |"


def cells(score: Mapping[str, Any]) -> tuple[str, ...]:
    """One row: means, each with its standard error."""
    size = f"{score['bits_per_weight']:.2f}"
    bits = f"{score['bits_per_byte']:.4f}"
    found = score["comparison"]
    if found is None:
        return f"unquantised (`{score['name']}`)", size, f"{score['perplexity']:.3f}", bits, "", ""
    agreement, divergence = found["top1_agreement"], found["kl_nats_per_token"]
    error = score["perplexity"] * found["excess_nats_per_token"]["standard_error"]
    return (
        f"`{score['name']}`",
        size,
        f"{score['perplexity']:.3f} ± {error:.3f}",
        bits,
        f"{100 * agreement['mean']:.2f} ± {100 * agreement['standard_error']:.2f} %",
        f"{divergence['mean']:.5f} ± {divergence['standard_error']:.5f}",
    )


@click.command()
@click.option("--save", "keep", is_flag=True, help="Keep the result with its date, and the plot.")
def main(keep: bool) -> None:
    """Compare every scheme with the built-in model: minutes."""
    runs = [
        measure(*arguments, plot=PICTURE if keep and not arguments else None) for arguments in RUNS
    ]
    for run in runs:
        click.echo(f"{run['command']}: {run['seconds']:.0f} s\n")
        click.echo("\n".join(markdown(run)) + "\n")
    if keep:
        text = report("python -m benchmarks.schemes", [], {"runs": runs})
        click.echo(f"kept in {save('schemes', text).name}", err=True)


if __name__ == "__main__":
    main()
