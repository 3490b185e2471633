"""The verb ``eval``: how well a model predicts a text that it was not trained on."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mortise.cli.options import configuration_options, json_option, resolve_options
from mortise.cli.output import document, print_json
from mortise.errors import RequestError

if TYPE_CHECKING:
    from mortise.cli.eval_measure import Reading
    from mortise.cli.eval_schemes import Asked, LeftOut, MeasuredModel
    from mortise.config import ResolvedConfig
    from mortise.engine.llm import LLM

DEFAULT_WINDOW = 1024


@click.command("eval", short_help="Measure perplexity on a text, and what quantising costs.")
@click.argument("file", required=False)
@click.option(
    "--schemes",
    metavar="all|NAME,NAME...",
    help="Compare the model with quantised copies of itself: bf16, fp8-block, w8a8, w4a8, w4a16,"
    " w4a4, nvfp4.",
)
@click.option(
    "--against",
    multiple=True,
    metavar="DIRECTORY",
    help="Compare the model with this one, quantised by anybody. Repeatable.",
)
@click.option("--plot", metavar="FILE", help="Draw the comparison: a file .svg or .png.")
@click.option(
    "--window",
    type=int,
    help=f"Tokens that the model sees at once.  [default: {DEFAULT_WINDOW}, at most its context]",
)
@click.option("--stride", type=int, help="Tokens from one window to the next.  [default: a window]")
@click.option("--documents", type=int, help="Score only this many texts, the first ones.")
@configuration_options
@json_option
def evaluate(file: str | None, as_json: bool, **options: Any) -> None:
    """Measure how well a model predicts FILE: perplexity per token and bits per byte.

    FILE is a text, or with the ending .jsonl one {"text": "..."} a line; without it the texts that
    were held out of the built-in model's training are taken. Every token of a text but the first is
    predicted once, from the tokens before it in its window. Beside the built-in model stand two
    baselines that count its training text: unigrams, and bigrams that back off to them.

    With --schemes the model is quantised as `mortise quantize` does it, into a temporary directory,
    and every copy predicts the same windows; with --against other directories do. Told is how often
    the likeliest token is the unquantised model's, and the mean Kullback-Leibler divergence from
    its predictions, each with its standard error over windows. All models are in memory together.
    bf16 is the unquantised model computed in bfloat16. --dispatch-dtype is not for the model that
    the others are compared with: it stays the same whatever is asked of them. Drafting changes no
    prediction, so no draft model is loaded.
    """
    from mortise.cli.eval_configuration import with_own_dispatch, without_draft
    from mortise.cli.eval_measure import Reading, compare, score_alone
    from mortise.cli.eval_rows import draw_rows, row_fields, show
    from mortise.cli.session import load_llm
    from mortise.evaluation.texts import TEXT_FILE, held_out_directory, read_documents

    asked = _comparison(options)
    plot = _plot(options["plot"], asked)
    resolved = without_draft(resolve_options(options))
    path = Path(file) if file is not None else held_out_directory() / TEXT_FILE
    found = read_documents(path)[: _at_least_one("--documents", options["documents"])]
    told: set[str] = set()
    llm = load_llm(resolved if asked is None else with_own_dispatch(resolved), told)
    length, stride = _window(llm, options["window"], options["stride"])
    token_ids = [one.token_ids(llm.tokenizer) for one in found]
    reading = Reading(documents=found, token_ids=token_ids, length=length, stride=stride)
    models, left_out = ([], []) if asked is None else _load(asked, resolved, llm, reading, told)
    started = time.perf_counter()
    rows = score_alone(llm, reading) if asked is None else compare(llm, models, reading)
    seconds = time.perf_counter() - started
    facts = {
        "text": str(path),
        "documents": len(found),
        "bytes": rows[0].score.text_bytes,
        "window": length,
        "stride": stride,
        "backend": llm.loaded.bound.row.name,
        "emulated": llm.loaded.bound.ops.backend.emulated,
        "device": str(llm.loaded.device),
        "dtype": str(llm.loaded.dtype).removeprefix("torch."),
        "seconds": seconds,
    }
    if plot is not None:
        draw_rows(rows, facts, plot)
    if as_json:
        left = [{"name": one.name, "reason": one.reason} for one in left_out]
        print_json(document(**facts, scores=[row_fields(row) for row in rows], left_out=left))
        return
    show(facts, rows)


def _comparison(options: dict[str, Any]) -> Asked | None:
    """What is to be compared; None if nothing is."""
    from mortise.cli.eval_schemes import Asked, require_one_process

    if options["schemes"] is None and not options["against"]:
        return None
    require_one_process()
    return Asked.of(options["schemes"], options["against"])


def _plot(file: str | None, asked: Asked | None) -> Path | None:
    """Where to draw, checked before anything takes time."""
    from mortise.evaluation.plot import require_plot

    if file is None:
        return None
    if asked is None:
        raise click.UsageError("--plot draws nothing without --schemes or --against")
    plot = Path(file)
    require_plot(plot)
    return plot


def _load(
    asked: Asked, resolved: ResolvedConfig, llm: LLM, reading: Reading, told: set[str]
) -> tuple[list[MeasuredModel], list[LeftOut]]:
    """The models that the first one is compared with, and what cannot be had."""
    from mortise.cli.eval_schemes import load_others, load_schemes, require_comparable
    from mortise.cli.failure import show_warning

    models, left_out = load_schemes(resolved, asked, told)
    for one in left_out:
        show_warning(f"{one.name} is left out: {one.reason}")
    models += load_others(resolved, asked, told)
    for model in models:
        require_comparable(llm, model, reading.documents, reading.length)
    return models, left_out


def _at_least_one(option: str, value: int | None) -> int | None:
    if value is not None and value < 1:
        raise RequestError(
            f"{option} is {value}", expected="an integer of at least 1", remedy=f"correct {option}"
        )
    return value


def _window(llm: LLM, window: int | None, stride: int | None) -> tuple[int, int]:
    context = llm.loaded.facts.max_position_embeddings
    length = min(DEFAULT_WINDOW, context) if window is None else window
    if not 1 <= length <= context:
        raise RequestError(
            f"--window is {length}",
            expected=f"an integer from 1 to {context}, the model's context",
            remedy="correct --window",
        )
    stride = length if stride is None else stride
    if not 1 <= stride <= length:
        raise RequestError(
            f"--stride is {stride}",
            expected=f"an integer from 1 to {length}, the window",
            remedy="correct --stride",
        )
    return length, stride
