"""The expert of every row, as a Triton program."""

# Triton compiles the source of this function: no annotation but constexpr, and it calls nothing
# but ``tl``.

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

tl: Any = importlib.import_module("triton.language") if importlib.util.find_spec("triton") else None


def row_experts_program(  # type: ignore[no-untyped-def]
    first_rows,
    counts,
    out,
    num_rows,
    NUM_GROUPS: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
) -> None:
    """Write of a block of rows which group each belongs to, -1 for none.

    Args:
        first_rows: pointer to int32 ``[E]``.
        counts: pointer to int32 ``[E]``.
        out: pointer to int32 ``[R]``.
        num_rows: R.
        NUM_GROUPS: E.
        GROUP_BLOCK: a power of two, at least E.
        BLOCK_ROWS: rows of a block.
    """
    group_ids = tl.arange(0, GROUP_BLOCK)
    there_G = group_ids < NUM_GROUPS
    firsts_G = tl.load(first_rows + group_ids, mask=there_G, other=0)
    counts_G = tl.load(counts + group_ids, mask=there_G, other=0)
    rows_R = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    behind_RG = rows_R[:, None] - firsts_G[None, :]
    inside_RG = (behind_RG >= 0) & (behind_RG < counts_G[None, :])
    # At most one group has the row.
    experts_R = tl.sum(tl.where(inside_RG, group_ids[None, :] + 1, 0), 1) - 1
    tl.store(out + rows_R, experts_R, mask=rows_R < num_rows)
