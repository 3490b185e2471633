"""What was measured, on which machine, shown as a table or as JSON, and kept with its date."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"
DISTRIBUTIONS = ("mortise-core", "pluggy", "torch")


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One number: the median over rounds, the best round, and the target where there is one."""

    name: str
    unit: str
    median: float
    best: float
    rounds: int
    target: float | None = None


def processor() -> str:
    """The processor's name where the system tells it."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in text.splitlines() if "model name" in line]
    return names[0] if names else platform.machine()


def machine() -> dict[str, object]:
    """Everything about the machine that a reader needs to judge the numbers."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "load_average_1_min": round(os.getloadavg()[0], 2),
        "versions": {name: version(name) for name in DISTRIBUTIONS},
    }


def report(command: str, measurements: list[Measurement], facts: dict[str, object]) -> str:
    """The whole result as JSON."""
    return json.dumps(
        {
            "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%MZ"),
            "command": command,
            "machine": machine(),
            **facts,
            "measurements": [asdict(measurement) for measurement in measurements],
        },
        indent=2,
    )


def save(name: str, text: str) -> Path:
    """Keep a result under ``benchmarks/results``, named by the benchmark and the day."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}-{datetime.now(UTC):%Y-%m-%d}.json"
    path.write_text(text + "\n", encoding="utf-8")
    return path


def show(title: str, measurements: list[Measurement]) -> None:
    """The measurements as a table for people."""
    table = Table(title=title)
    for heading in ("what", "median", "best", "unit", "target"):
        table.add_column(heading, justify="left" if heading in ("what", "unit") else "right")
    for found in measurements:
        target = "" if found.target is None else f"at most {found.target:g}"
        table.add_row(found.name, f"{found.median:,.1f}", f"{found.best:,.1f}", found.unit, target)
    Console().print(table)
