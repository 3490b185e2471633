"""The verb ``eval``: how well a model predicts a text that it was not trained on."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mortise.cli.options import configuration_options, json_option, resolve_options
from mortise.cli.output import document, print_json, results, table
from mortise.errors import RequestError

if TYPE_CHECKING:
    from mortise.engine.llm import LLM
    from mortise.evaluation.score import Score
    from mortise.evaluation.texts import Document

DEFAULT_WINDOW = 1024


@click.command("eval", short_help="Measure perplexity on a text.")
@click.argument("file", required=False)
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
    """
    from mortise.cli.session import load_llm, progress_bar
    from mortise.evaluation.likelihood import score_documents
    from mortise.evaluation.texts import TEXT_FILE, held_out_directory, read_documents

    resolved = resolve_options(options)
    path = Path(file) if file is not None else held_out_directory() / TEXT_FILE
    found = read_documents(path)[: _at_least_one("--documents", options["documents"])]
    llm = load_llm(resolved)
    length, stride = _window(llm, options["window"], options["stride"])
    token_ids = [one.token_ids(llm.tokenizer) for one in found]
    started = time.perf_counter()
    with progress_bar("predicting") as advance:
        score = score_documents(
            llm.logits, found, token_ids, length=length, stride=stride, progress=advance
        )
    seconds = time.perf_counter() - started
    scores = {llm.loaded.directory.path.name: score, **_baselines(llm, found, token_ids)}
    facts = {
        "text": str(path),
        "documents": len(found),
        "bytes": score.text_bytes,
        "window": length,
        "stride": stride,
        "seconds": seconds,
    }
    if as_json:
        print_json(document(**facts, scores=[_fields(*entry) for entry in scores.items()]))
        return
    _show(facts, scores)


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


def _baselines(llm: LLM, documents: list[Document], token_ids: list[list[int]]) -> dict[str, Score]:
    """Only beside the model whose tokens were counted."""
    from mortise.evaluation.ngrams import Ngrams, ngram_scores
    from mortise.evaluation.texts import NGRAMS_FILE, held_out_directory, total_bytes

    if llm.config.model != "builtin":
        return {}
    bos_token_id = llm.tokenizer.bos_token_id
    assert bos_token_id is not None
    ngrams = Ngrams.load(held_out_directory() / NGRAMS_FILE)
    return ngram_scores(ngrams, bos_token_id, token_ids, total_bytes(documents))


def _fields(name: str, score: Score) -> dict[str, Any]:
    return {
        "name": name,
        "predicted_tokens": score.predicted_tokens,
        "nats_per_token": score.nats_per_token,
        "perplexity": score.perplexity,
        "bits_per_byte": score.bits_per_byte,
    }


def _show(facts: dict[str, Any], scores: dict[str, Score]) -> None:
    console = results()
    console.print(
        f"{facts['documents']} texts, {facts['bytes']} bytes, of {facts['text']}\n"
        f"windows of {facts['window']} tokens, {facts['stride']} apart;"
        f" {facts['seconds']:.1f} s\n",
        markup=False,
        soft_wrap=True,
    )
    console.print(
        table(
            ("model", "tokens predicted", "perplexity per token", "bits per byte"),
            [
                (
                    name,
                    str(score.predicted_tokens),
                    f"{score.perplexity:.2f}",
                    f"{score.bits_per_byte:.3f}",
                )
                for name, score in scores.items()
            ],
        )
    )
