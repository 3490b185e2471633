"""One row of a table: a case, what was measured of it in each way, and what follows from that."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One case.

    Args:
        benchmark: what it belongs to.
        case: shape and sizes in words.
        microseconds: the median of each way.
        figures: of each way, what follows from its time: TFLOPS, parts of a bandwidth.
        missing: ways that could not be measured, and why.
        sizes: numbers of the case by name, for what is made of the result.
    """

    benchmark: str
    case: str
    microseconds: Mapping[str, float]
    figures: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    missing: Mapping[str, str] = field(default_factory=dict)
    sizes: Mapping[str, float] = field(default_factory=dict)


def show(rows: Sequence[Row]) -> None:
    """A table for each benchmark, a line for each case and way."""
    console = Console()
    for name in dict.fromkeys(row.benchmark for row in rows):
        own = [row for row in rows if row.benchmark == name]
        figures = list(
            dict.fromkeys(one for row in own for found in row.figures.values() for one in found)
        )
        table = Table(title=name)
        table.add_column("case")
        table.add_column("way")
        for heading in ("median, us", *figures):
            table.add_column(heading, justify="right")
        for row in own:
            _add(table, row, figures)
        console.print(table)
        for way, why in {way: why for row in own for way, why in row.missing.items()}.items():
            console.print(f"not measured: {way}: {why}", markup=False)


def _add(table: Table, row: Row, figures: Sequence[str]) -> None:
    for number, (way, taken) in enumerate(row.microseconds.items()):
        found = row.figures.get(way, {})
        shown = [f"{found[one]:,.3g}" if one in found else "" for one in figures]
        last = number == len(row.microseconds) - 1
        table.add_row("" if number else row.case, way, f"{taken:,.1f}", *shown, end_section=last)
