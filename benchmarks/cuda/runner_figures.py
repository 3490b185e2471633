"""The table by which a backend chooses between DeepGEMM and Triton, made of what was measured."""

from __future__ import annotations

from datetime import UTC, datetime
from itertools import groupby
from typing import TYPE_CHECKING, Any

import tomli_w

from benchmarks.cuda import moe

if TYPE_CHECKING:
    from collections.abc import Iterable

    from benchmarks.cuda.rows import Row


def table(rows: Iterable[Row], chip: str) -> str:
    """TOML for the option ``runner_figures``, of the cases that both runners could do.

    Args:
        rows: of all benchmarks.
        chip: the name that its driver gives.
    """
    both = [
        row
        for row in rows
        if row.benchmark == moe.NAME and {"deep_gemm", "triton"} <= row.microseconds.keys()
    ]
    both.sort(key=_hidden_size)
    measurements = [
        {
            "source": "python -m benchmarks.cuda",
            "date": datetime.now(UTC).date(),
            "chip": chip,
            "hidden_size": hidden_size,
            "figures": [_figure(row) for row in of_size],
        }
        for hidden_size, of_size in groupby(both, key=_hidden_size)
    ]
    return tomli_w.dumps({"measurements": measurements})


def _hidden_size(row: Row) -> int:
    return int(row.sizes["hidden_size"])


def _figure(row: Row) -> dict[str, Any]:
    return {
        "intermediate_size": int(row.sizes["intermediate_size"]),
        "rows_per_expert": float(row.sizes["rows_per_expert"]),
        "deep_gemm_us": row.microseconds["deep_gemm"],
        "triton_us": row.microseconds["triton"],
    }
