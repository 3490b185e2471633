"""What ``eval`` measured: a row a model, as a table, as fields of a document, as a plot."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from mortise.cli.output import results, table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from mortise.evaluation.comparison import Comparison
    from mortise.evaluation.estimate import Estimate
    from mortise.evaluation.score import Score

SCORE_COLUMNS: Final = ("model", "tokens predicted", "perplexity per token", "bits per byte")
COMPARISON_COLUMNS: Final = (
    "model",
    "bytes",
    "bits/weight",
    "perplexity",
    "bits/byte",
    "same top-1",
    "KL, nats",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One model.

    Args:
        name: of its directory or scheme; ``unigram``, ``bigram``.
        score: how well it predicts the texts.
        weight_bytes: of all tensors of its checkpoint; None of a baseline.
        bits_per_weight: of each number of the unquantised checkpoint; None where that is not known.
        comparison: with the unquantised model; None of a model that was compared with nothing.
    """

    name: str
    score: Score
    weight_bytes: int | None = None
    bits_per_weight: float | None = None
    comparison: Comparison | None = None


def row_fields(row: Row) -> dict[str, Any]:
    """A row as a program reads it; what is no finite number is null."""
    return {
        "name": row.name,
        "predicted_tokens": row.score.predicted_tokens,
        "nats_per_token": _finite(row.score.nats_per_token),
        "perplexity": _finite(row.score.perplexity),
        "bits_per_byte": _finite(row.score.bits_per_byte),
        "weight_bytes": row.weight_bytes,
        "bits_per_weight": row.bits_per_weight,
        "comparison": None if row.comparison is None else _comparison_fields(row.comparison),
    }


def _comparison_fields(comparison: Comparison) -> dict[str, Any]:
    return {
        "windows": len(comparison.windows),
        "excess_nats_per_token": _estimate_fields(comparison.excess_nats),
        "top1_agreement": _estimate_fields(comparison.agreement),
        "kl_nats_per_token": _estimate_fields(comparison.divergence_nats),
    }


def _estimate_fields(estimate: Estimate) -> dict[str, float | None]:
    error = estimate.standard_error
    return {
        "mean": _finite(estimate.mean),
        "standard_error": None if error is None else _finite(error),
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def show(facts: Mapping[str, Any], rows: Sequence[Row]) -> None:
    """Print the facts, and a table."""
    console = results()
    emulated = ", emulated" if facts["emulated"] else ""
    console.print(
        f"{facts['documents']} texts, {facts['bytes']} bytes, of {facts['text']}\n"
        f"windows of {facts['window']} tokens, {facts['stride']} apart;"
        f" {facts['backend']} on {facts['device']}{emulated}, {facts['dtype']};"
        f" {facts['seconds']:.1f} s\n",
        markup=False,
        soft_wrap=True,
    )
    compared = [row.comparison for row in rows if row.comparison is not None]
    if compared:
        console.print(table(COMPARISON_COLUMNS, map(_comparison_cells, rows)))
        console.print(f"\n{_legend(rows[0], compared[0])}", markup=False, soft_wrap=True)
    else:
        console.print(table(SCORE_COLUMNS, map(_score_cells, rows)))


def _legend(reference: Row, comparison: Comparison) -> str:
    told = f"{reference.score.predicted_tokens} tokens predicted, each compared with"
    if comparison.excess_nats.standard_error is None:
        return f"{told} {reference.name}"
    return (
        f"{told} {reference.name}; ± is one standard error over {len(comparison.windows)} windows,"
        " of the perplexity that of its difference"
    )


def _score_cells(row: Row) -> tuple[str, ...]:
    return (
        row.name,
        str(row.score.predicted_tokens),
        f"{row.score.perplexity:.2f}",
        f"{row.score.bits_per_byte:.3f}",
    )


def _comparison_cells(row: Row) -> tuple[str, ...]:
    found = row.comparison
    perplexity = row.score.perplexity
    cells = (
        row.name,
        str(row.weight_bytes),
        "" if row.bits_per_weight is None else f"{row.bits_per_weight:.2f}",
    )
    if found is None:
        return (*cells, f"{perplexity:.3f}", f"{row.score.bits_per_byte:.4f}", "", "")
    # The slope of exp(nats) is the perplexity itself.
    return (
        *cells,
        f"{perplexity:.3f}{_plus_minus(found.excess_nats, 3, perplexity)}",
        f"{row.score.bits_per_byte:.4f}",
        f"{100 * found.agreement.mean:.2f}{_plus_minus(found.agreement, 2, 100)} %",
        f"{found.divergence_nats.mean:.5f}{_plus_minus(found.divergence_nats, 5)}",
    )


def _plus_minus(estimate: Estimate, digits: int, factor: float = 1.0) -> str:
    if estimate.standard_error is None:
        return ""
    return f" ± {factor * estimate.standard_error:.{digits}f}"


def draw_rows(rows: Sequence[Row], facts: Mapping[str, Any], path: Path) -> None:
    """Draw every row that was compared with the first one.

    Raises:
        RequestError: the file cannot be written.
    """
    from mortise.evaluation.plot import PlottedModel, draw

    models = [
        PlottedModel(
            name=row.name,
            bits_per_weight=row.bits_per_weight,
            perplexity=row.score.perplexity,
            excess_nats=row.comparison.excess_nats,
            divergence_nats=row.comparison.divergence_nats,
        )
        for row in rows
        if row.comparison is not None
    ]
    emulated = " (emulated)" if facts["emulated"] else ""
    title = (
        f"{rows[0].name} on {facts['backend']}{emulated}, {facts['dtype']}:"
        f" {facts['documents']} texts, {rows[0].score.predicted_tokens} tokens"
    )
    draw(models, rows[0].score.perplexity, path, title)
