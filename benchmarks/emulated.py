"""What an emulated chip makes of each scheme, beside the reference, from the same checkpoints."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import click

from benchmarks.report import report, save

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Chips of one vendor beside the reference.

    Args:
        name: of the result that is kept.
        documents: held-out texts that are measured, the first of all.
        checkpoints: options of ``mortise quantize``, by the name of what it makes.
        runs: for each column options of ``mortise eval``, and the checkpoints that it can run.
    """

    name: str
    documents: int
    checkpoints: Mapping[str, tuple[str, ...]]
    runs: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]]


def emulated(backend: str, **options: str) -> tuple[str, ...]:
    """Options of ``mortise`` for a backend whose device is emulated."""
    table = [("--set", f"backend_options.{backend}.{key}={one}") for key, one in options.items()]
    return (
        "--backend",
        backend,
        "--device",
        "emulated",
        *(text for pair in table for text in pair),
    )


ASCEND = Comparison(
    name="emulated",
    documents=12,
    checkpoints={
        "w8a8": ("--scheme", "w8a8"),
        "w4a8": ("--scheme", "w4a8"),
        "w4a16": ("--scheme", "w4a16"),
        "w4a4": ("--scheme", "w4a4"),
        "w4a4, down w8a8": ("--scheme", "w4a4", "--scheme-for", "*experts*down_proj=w8a8"),
    },
    runs={
        "reference": ((), ("w8a8", "w4a8", "w4a16", "w4a4", "w4a4, down w8a8")),
        "A2, A3": (
            emulated("npu_ascend", generation="A2"),
            ("w8a8", "w4a8", "w4a16", "w4a4", "w4a4, down w8a8"),
        ),
        # Its matrix units take no int4 rows.
        "A5": (emulated("npu_ascend", generation="A5"), ("w8a8", "w4a8", "w4a16")),
    },
)
CUDA = Comparison(
    name="cuda-emulated",
    documents=4,
    checkpoints={
        "fp8-block": ("--scheme", "fp8-block"),
        "w4a16": ("--scheme", "w4a16"),
        "nvfp4": ("--scheme", "nvfp4"),
    },
    runs={
        "reference": ((), ("fp8-block", "w4a16", "nvfp4")),
        # It has no fp4 units.
        "Hopper": (emulated("cuda_hopper"), ("fp8-block", "w4a16")),
        "Hopper, Triton alone": (
            emulated("cuda_hopper", runner="triton", indexer="triton"),
            ("fp8-block", "w4a16"),
        ),
        "Blackwell": (emulated("cuda_blackwell"), ("fp8-block", "w4a16", "nvfp4")),
    },
)
COMPARISONS = {one.name: one for one in (ASCEND, CUDA)}


def mortise(*arguments: str) -> dict[str, Any]:
    """One command, and the document that it printed."""
    outcome = subprocess.run(
        [sys.executable, "-m", "mortise", *arguments, "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    if outcome.returncode:
        raise click.ClickException(outcome.stderr)
    found: dict[str, Any] = json.loads(outcome.stdout)
    return found


def measure(comparison: Comparison, name: str, folder: Path) -> dict[str, Any]:
    """The perplexity of every checkpoint on one device, the unquantised model first."""
    options, names = comparison.runs[name]
    against = [text for one in names for text in ("--against", str(folder / one))]
    found = mortise("eval", "--documents", str(comparison.documents), *options, *against)
    unquantised, *scores = found["scores"]
    perplexity = {"bf16": unquantised["perplexity"]} | {
        one: score["perplexity"] for one, score in zip(names, scores, strict=True)
    }
    return {
        "device": name,
        "options": list(options),
        "emulated": found["emulated"],
        "documents": found["documents"],
        "predicted_tokens": unquantised["predicted_tokens"],
        "perplexity": perplexity,
    }


def markdown(comparison: Comparison, runs: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A row a checkpoint, a column a device."""
    yield f"| checkpoint | {' | '.join(run['device'] for run in runs)} |"
    yield f"|---{'|---:' * len(runs)}|"
    for name in ("bf16", *comparison.checkpoints):
        cells = [run["perplexity"].get(name) for run in runs]
        shown = ["refused" if cell is None else f"{cell:.4f}" for cell in cells]
        yield f"| {name} | {' | '.join(shown)} |"


@click.command()
@click.option(
    "--only", type=click.Choice(list(COMPARISONS)), multiple=True, help="Leave out the others."
)
@click.option("--save", "keep", is_flag=True, help="Keep the result with its date.")
def main(only: tuple[str, ...], keep: bool) -> None:
    """Compare emulated chips with the reference on the built-in model: minutes."""
    for name in only or COMPARISONS:
        comparison = COMPARISONS[name]
        with TemporaryDirectory() as folder:
            for checkpoint, options in comparison.checkpoints.items():
                mortise("quantize", str(Path(folder) / checkpoint), *options)
            runs = [measure(comparison, run, Path(folder)) for run in comparison.runs]
        click.echo("\n".join(markdown(comparison, runs)))
        if keep:
            command = f"python -m benchmarks.emulated --only {name}"
            text = report(command, [], {"runs": runs})
            click.echo(f"kept in {save(name, text).name}", err=True)


if __name__ == "__main__":
    main()
