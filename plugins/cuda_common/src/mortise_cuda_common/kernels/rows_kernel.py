"""What is done to rows 128 columns at a time, as a Triton program: gated, quantised, or both."""

# Triton compiles the source of this function: no annotation but constexpr, and it calls nothing
# but ``tl``.

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

tl: Any = importlib.import_module("triton.language") if importlib.util.find_spec("triton") else None


def rows_program(  # type: ignore[no-untyped-def]
    rows,
    out,
    out_scales,
    first_rows,
    counts,
    num_rows,
    row_stride,
    out_scale_step,
    WIDTH: tl.constexpr,
    GATED: tl.constexpr,
    QUANTISED: tl.constexpr,
    POWERS_OF_TWO: tl.constexpr,
    GROUPED: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """Take one tile of rows and 128 columns of the result.

    Args:
        rows: pointer to ``[R, WIDTH]``, gated ``[R, 2 * WIDTH]`` (gate, then up), bfloat16 or
            float32; rows may be apart, columns may not.
        out: pointer to ``[R, WIDTH]``, contiguous; e4m3 where quantised, else of the rows' dtype.
        out_scales: pointer to float32, one for a row and 128 columns, column after column; not
            used where nothing is quantised.
        first_rows: pointer to int32 ``[E]``, the first row of each group.
        counts: pointer to int32 ``[E]``, the rows of each group.
        num_rows: R.
        row_stride: from one row of ``rows`` to the next.
        out_scale_step: from one column of ``out_scales`` to the next.
        WIDTH: columns of the result.
        GATED: silu(gate) * up, rounded as often as tensors of torch of the rows' dtype are.
        QUANTISED: to e4m3, as ``mortise.formats.fp8``.
        POWERS_OF_TWO: whether the scales are.
        GROUPED: whether only rows of groups are taken.
        NUM_GROUPS: E.
        GROUP_BLOCK: a power of two, at least E.
        BLOCK_M: rows of a tile.
        BLOCK_N: 128.
    """
    COLUMN_TILES: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
    tile = tl.program_id(0) // COLUMN_TILES
    column_tile = tl.program_id(0) % COLUMN_TILES
    if GROUPED:
        group_ids = tl.arange(0, GROUP_BLOCK)
        counts_G = tl.load(counts + group_ids, mask=group_ids < NUM_GROUPS, other=0)
        tiles_G = (counts_G + BLOCK_M - 1) // BLOCK_M
        ends_G = tl.cumsum(tiles_G, 0)
        is_tile = tile < tl.sum(tiles_G, 0)
        group = tl.sum((ends_G <= tile).to(tl.int32), 0)
        tiles_before = tl.sum(tl.where(group_ids < group, tiles_G, 0), 0)
        row_of_group = (tile - tiles_before) * BLOCK_M
        rows_left = tl.load(counts + group, mask=is_tile, other=0) - row_of_group
        row = tl.load(first_rows + group, mask=is_tile, other=0).to(tl.int64) + row_of_group
    else:
        row = tile.to(tl.int64) * BLOCK_M
        rows_left = num_rows - row
    if rows_left > 0:
        offs_M = tl.arange(0, BLOCK_M)
        offs_N = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
        there_M = offs_M < rows_left
        inside = there_M[:, None] & (offs_N < WIDTH)[None, :]
        row_ptrs = rows + (row + offs_M)[:, None] * row_stride + offs_N[None, :]
        out_ptrs = out + (row + offs_M)[:, None] * WIDTH + offs_N[None, :]
        values = tl.load(row_ptrs, mask=inside, other=0.0).to(tl.float32)
        if GATED:
            up = tl.load(row_ptrs + WIDTH, mask=inside, other=0.0).to(tl.float32)
            silu = values / (1.0 + tl.exp(-values))
            silu = silu.to(rows.dtype.element_ty).to(tl.float32)
            values = (silu * up).to(rows.dtype.element_ty).to(tl.float32)
        if QUANTISED:
            # A number that is none makes its whole group such, as in mortise.formats.fp8.
            is_number = values == values
            amax_M = tl.max(tl.where(is_number, tl.abs(values), 0.0), 1)
            all_numbers_M = tl.min(is_number.to(tl.int32), 1) != 0
            scale_M = tl.div_rn(tl.maximum(amax_M, 1e-10), 448.0)
            scale_M = tl.where(all_numbers_M, scale_M, float("nan"))
            if POWERS_OF_TWO:
                bits_M = scale_M.to(tl.int32, bitcast=True)
                exponent_M = (bits_M >> 23) & 0xFF
                exponent_M += ((bits_M & 0x7FFFFF) != 0).to(tl.int32)
                exponent_M = tl.minimum(tl.maximum(exponent_M, 1), 254)
                scale_M = (exponent_M << 23).to(tl.float32, bitcast=True)
            scaled = values * tl.div_rn(1.0, scale_M)[:, None]
            clamped = tl.minimum(tl.maximum(scaled, -448.0), 448.0)
            quantised = tl.where(scaled == scaled, clamped, float("nan"))
            tl.store(out_ptrs, quantised.to(tl.float8e4nv), mask=inside)
            scale_ptrs = out_scales + column_tile.to(tl.int64) * out_scale_step + row + offs_M
            tl.store(scale_ptrs, scale_M, mask=there_M)
        else:
            tl.store(out_ptrs, values.to(out.dtype.element_ty), mask=inside)
