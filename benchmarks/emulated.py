"""What an emulated chip makes of each scheme, beside the reference, from the same checkpoints."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import click

from benchmarks.report import report, save

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

DOCUMENTS = "12"
CHECKPOINTS = {
    "w8a8": ("--scheme", "w8a8"),
    "w4a8": ("--scheme", "w4a8"),
    "w4a16": ("--scheme", "w4a16"),
    "w4a4": ("--scheme", "w4a4"),
    "w4a4, down w8a8": ("--scheme", "w4a4", "--scheme-for", "*experts*down_proj=w8a8"),
}
"""Options of ``mortise quantize``, by the name of what it makes."""
ASCEND = ("--backend", "npu_ascend", "--device", "emulated")
RUNS = {
    "reference": ((), tuple(CHECKPOINTS)),
    "A2, A3": ((*ASCEND, "--set", "backend_options.npu_ascend.generation=A2"), tuple(CHECKPOINTS)),
    # Its matrix units take no int4 rows.
    "A5": (
        (*ASCEND, "--set", "backend_options.npu_ascend.generation=A5"),
        ("w8a8", "w4a8", "w4a16"),
    ),
}
"""Options of ``mortise eval``, and the checkpoints that the device can run."""


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


def measure(name: str, folder: Path) -> dict[str, Any]:
    """The perplexity of every checkpoint on one device, the unquantised model first."""
    options, names = RUNS[name]
    against = [text for one in names for text in ("--against", str(folder / one))]
    found = mortise("eval", "--documents", DOCUMENTS, *options, *against)
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


def markdown(runs: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A row a checkpoint, a column a device."""
    yield f"| checkpoint | {' | '.join(run['device'] for run in runs)} |"
    yield f"|---{'|---:' * len(runs)}|"
    for name in ("bf16", *CHECKPOINTS):
        cells = [run["perplexity"].get(name) for run in runs]
        shown = ["refused" if cell is None else f"{cell:.4f}" for cell in cells]
        yield f"| {name} | {' | '.join(shown)} |"


@click.command()
@click.option("--save", "keep", is_flag=True, help="Keep the result with its date.")
def main(keep: bool) -> None:
    """Compare an emulated Ascend with the reference on the built-in model: minutes."""
    with TemporaryDirectory() as folder:
        for name, options in CHECKPOINTS.items():
            mortise("quantize", str(Path(folder) / name), *options)
        runs = [measure(name, Path(folder)) for name in RUNS]
    click.echo("\n".join(markdown(runs)))
    if keep:
        text = report("python -m benchmarks.emulated", [], {"runs": runs})
        click.echo(f"kept in {save('emulated', text).name}", err=True)


if __name__ == "__main__":
    main()
