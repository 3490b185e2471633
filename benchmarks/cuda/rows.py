"""One row of a table: a case, what was measured of it in each way, and what it is compared with."""

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
        figures: what follows from them, by name: TFLOPS, parts of a bandwidth.
        missing: ways that could not be measured, and why.
    """

    benchmark: str
    case: str
    microseconds: Mapping[str, float]
    figures: Mapping[str, float] = field(default_factory=dict)
    missing: Mapping[str, str] = field(default_factory=dict)


def show(rows: Sequence[Row]) -> None:
    """A table for each benchmark."""
    console = Console()
    for name in dict.fromkeys(row.benchmark for row in rows):
        own = [row for row in rows if row.benchmark == name]
        ways = list(dict.fromkeys(way for row in own for way in row.microseconds))
        figures = list(dict.fromkeys(figure for row in own for figure in row.figures))
        table = Table(title=name)
        table.add_column("case")
        for heading in (*(f"{way}, us" for way in ways), *figures):
            table.add_column(heading, justify="right")
        for row in own:
            times = [
                f"{row.microseconds[way]:,.1f}" if way in row.microseconds else "" for way in ways
            ]
            rest = [f"{row.figures[one]:,.3g}" if one in row.figures else "" for one in figures]
            table.add_row(row.case, *times, *rest)
        console.print(table)
        for way, why in {way: why for row in own for way, why in row.missing.items()}.items():
            console.print(f"not measured: {way}: {why}", markup=False)


def _text(numbers: Mapping[str, float], name: str, form: str) -> str:
    return format(numbers[name], form) if name in numbers else ""
