"""Every measurement on a GPU with one command: ``python -m benchmarks.cuda --save``."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click
import torch

from benchmarks.cuda import indexer, model, moe, qkv, runner_figures
from benchmarks.cuda.clock import Clock, copy_bandwidth
from benchmarks.cuda.rows import Row, show
from benchmarks.cuda.subjects import bound
from benchmarks.report import report, save
from mortise.errors import MortiseError

if TYPE_CHECKING:
    from collections.abc import Iterator

BENCHMARKS = (qkv.NAME, indexer.NAME, moe.NAME, model.NAME)
TINY = moe.Shape(name="tiny, 4 of 256 x 128", experts=4, hidden=256, intermediate=128, chosen=2)


@click.command()
@click.option("--backend", default="cuda_hopper", show_default=True)
@click.option("--device", default=None, help="As of the engine; unset is the GPU.")
@click.option("--only", multiple=True, type=click.Choice(BENCHMARKS), help="Leave out the others.")
@click.option("--rounds", default=30, show_default=True, help="Timed calls of each way.")
@click.option("--tiny", is_flag=True, help="Small sizes, to see that everything runs.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
@click.option(
    "--figures",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Also write a table for the option runner_figures.",
)
@click.option("--save", "keep", is_flag=True, help="Write the result to benchmarks/results.")
def main(
    backend: str,
    device: str | None,
    only: tuple[str, ...],
    rounds: int,
    tiny: bool,
    as_json: bool,
    figures: Path | None,
    keep: bool,
) -> None:
    """Measure the hooks of a backend on a GPU, beside their peers."""
    try:
        capabilities = bound(backend, device).ops.capabilities
    except MortiseError as error:
        raise click.ClickException(str(error)) from error
    if keep and (tiny or capabilities.emulated):
        raise click.UsageError("--save keeps times of a GPU alone, at full size")
    clock = Clock(device=capabilities.device, rounds=rounds, warm_up=1 if tiny else 3)
    rows = list(_rows(backend, device, clock, only or BENCHMARKS, tiny=tiny))
    text = report(_command(backend, only, rounds), [], _facts(clock, rows, capabilities.emulated))
    if figures is not None:
        on_gpu = clock.device.type == "cuda"
        chip = torch.cuda.get_device_name(clock.device) if on_gpu else "no GPU"
        figures.write_text(runner_figures.table(rows, chip), encoding="utf-8")
    if as_json:
        click.echo(text)
    else:
        show(rows)
    if keep:
        click.echo(f"written: {save('cuda', text).relative_to(Path.cwd())}", err=True)


def _rows(
    backend: str, device: str | None, clock: Clock, names: tuple[str, ...], *, tiny: bool
) -> Iterator[Row]:
    if qkv.NAME in names:
        yield from qkv.measure(backend, device, clock, *([(1, 9)] if tiny else []))
    if indexer.NAME in names:
        yield from indexer.measure(backend, device, clock, *([((2, 300),)] if tiny else []))
    if moe.NAME in names:
        yield from moe.measure(backend, device, clock, *([(TINY,), (1, 5)] if tiny else []))
    if model.NAME in names:
        yield from model.measure(backend, device, *([(1,), 2] if tiny else []))


def _facts(clock: Clock, rows: list[Row], emulated: bool) -> dict[str, object]:
    on_gpu = clock.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(clock.device) if on_gpu else "no GPU",
        "emulated": emulated,
        "copy_bandwidth_bytes_per_second": copy_bandwidth(clock) if on_gpu else None,
        "rows": [json.loads(json.dumps(asdict(row))) for row in rows],
    }


def _command(backend: str, only: tuple[str, ...], rounds: int) -> str:
    chosen = "".join(f" --only {name!r}" for name in only)
    return f"python -m benchmarks.cuda --backend {backend} --rounds {rounds}{chosen}"


if __name__ == "__main__":
    main()
