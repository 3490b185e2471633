"""Grouped products of unquantised rows with unquantised weights, as Triton programs."""

# Triton compiles the source of these functions: no annotation but constexpr, and they call nothing
# but ``tl``. So each begins with the same search for its group.

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

tl: Any = importlib.import_module("triton.language") if importlib.util.find_spec("triton") else None


def product_program(  # type: ignore[no-untyped-def]
    rows,
    weight,
    out,
    first_rows,
    counts,
    N: tl.constexpr,
    K: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WEIGHT_FIRST: tl.constexpr,
    TILES_ABREAST: tl.constexpr,
) -> None:
    """Multiply one tile of one group's rows by one block of its expert's weight rows.

    Args:
        rows: pointer to ``[R, K]``, contiguous.
        weight: pointer to ``[E, N, K]`` of the rows' dtype, contiguous.
        out: pointer to ``[R, N]``, contiguous.
        first_rows: pointer to int32 ``[E]``, the first row of each group.
        counts: pointer to int32 ``[E]``, the rows of each group.
        N: rows of a weight.
        K: columns of a weight.
        NUM_GROUPS: E.
        GROUP_BLOCK: a power of two, at least E.
        BLOCK_M: rows of a tile.
        BLOCK_N: weight rows of a tile.
        BLOCK_K: columns that are multiplied at a time.
        WEIGHT_FIRST: whether the weight is the tensor core's first operand, which is 64 high or
            more, as few rows are not.
        TILES_ABREAST: tiles of rows that are computed side by side, for the sake of L2.
    """
    COLUMN_TILES: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N

    group_ids = tl.arange(0, GROUP_BLOCK)
    counts_G = tl.load(counts + group_ids, mask=group_ids < NUM_GROUPS, other=0)
    tiles_G = (counts_G + BLOCK_M - 1) // BLOCK_M
    ends_G = tl.cumsum(tiles_G, 0)
    num_tiles = tl.sum(tiles_G, 0)
    task = tl.program_id(0)
    if task < num_tiles * COLUMN_TILES:
        first_tile = task // (TILES_ABREAST * COLUMN_TILES) * TILES_ABREAST
        abreast = tl.minimum(num_tiles - first_tile, TILES_ABREAST)
        within = task % (TILES_ABREAST * COLUMN_TILES)
        tile = first_tile + within % abreast
        column_tile = within // abreast
        group = tl.sum((ends_G <= tile).to(tl.int32), 0)
        tiles_before = tl.sum(tl.where(group_ids < group, tiles_G, 0), 0)
        row_of_group = (tile - tiles_before) * BLOCK_M
        rows_left = tl.load(counts + group) - row_of_group
        row = (tl.load(first_rows + group) + row_of_group).to(tl.int64)
        column = column_tile * BLOCK_N

        offs_M = tl.arange(0, BLOCK_M)
        offs_N = tl.arange(0, BLOCK_N)
        offs_K = tl.arange(0, BLOCK_K)
        there_M = offs_M < rows_left
        there_N = column + offs_N < N
        weight_row = group.to(tl.int64) * N + column
        row_ptrs = rows + row * K + (offs_M[:, None] * K + offs_K[None, :])
        weight_ptrs = weight + weight_row * K + (offs_N[:, None] * K + offs_K[None, :])

        if WEIGHT_FIRST:
            sums = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
        else:
            sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for first in range(0, K, BLOCK_K):
            row_mask = there_M[:, None]
            weight_mask = there_N[:, None]
            if K % BLOCK_K != 0:
                there_K = first + offs_K < K
                row_mask = row_mask & there_K[None, :]
                weight_mask = weight_mask & there_K[None, :]
            values_MK = tl.load(row_ptrs, mask=row_mask, other=0.0)
            weight_NK = tl.load(weight_ptrs, mask=weight_mask, other=0.0)
            if WEIGHT_FIRST:
                sums = tl.dot(weight_NK, tl.trans(values_MK), sums)
            else:
                sums = tl.dot(values_MK, tl.trans(weight_NK), sums)
            row_ptrs += BLOCK_K
            weight_ptrs += BLOCK_K

        if WEIGHT_FIRST:
            sums = tl.trans(sums)
        out_ptrs = out + row * N + column + (offs_M[:, None] * N + offs_N[None, :])
        inside = there_M[:, None] & there_N[None, :]
        tl.store(out_ptrs, sums.to(out.dtype.element_ty), mask=inside)


def gate_up_program(  # type: ignore[no-untyped-def]
    rows,
    weight,
    out,
    first_rows,
    counts,
    WIDTH: tl.constexpr,
    K: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WEIGHT_FIRST: tl.constexpr,
    TILES_ABREAST: tl.constexpr,
) -> None:
    """Multiply one tile of one group's rows by as many rows of gate as of up, and gate them.

    Nothing is rounded between the sums and the result: silu(gate) * up is taken in float32.

    Args:
        rows: pointer to ``[R, K]``, contiguous.
        weight: pointer to ``[E, 2 * WIDTH, K]``, contiguous: gate over up.
        out: pointer to ``[R, WIDTH]``, contiguous.
        first_rows: pointer to int32 ``[E]``, the first row of each group.
        counts: pointer to int32 ``[E]``, the rows of each group.
        WIDTH: columns of the result.
        K: columns of a weight.
        NUM_GROUPS: E.
        GROUP_BLOCK: a power of two, at least E.
        BLOCK_M: rows of a tile.
        BLOCK_N: columns of the result in a tile.
        BLOCK_K: columns that are multiplied at a time.
        WEIGHT_FIRST: whether the weight is the tensor core's first operand, which is 64 high or
            more, as few rows are not.
        TILES_ABREAST: tiles of rows that are computed side by side, for the sake of L2.
    """
    WIDTH_BLOCKS: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N

    group_ids = tl.arange(0, GROUP_BLOCK)
    counts_G = tl.load(counts + group_ids, mask=group_ids < NUM_GROUPS, other=0)
    tiles_G = (counts_G + BLOCK_M - 1) // BLOCK_M
    ends_G = tl.cumsum(tiles_G, 0)
    num_tiles = tl.sum(tiles_G, 0)
    task = tl.program_id(0)
    if task < num_tiles * WIDTH_BLOCKS:
        first_tile = task // (TILES_ABREAST * WIDTH_BLOCKS) * TILES_ABREAST
        abreast = tl.minimum(num_tiles - first_tile, TILES_ABREAST)
        within = task % (TILES_ABREAST * WIDTH_BLOCKS)
        tile = first_tile + within % abreast
        column_tile = within // abreast
        group = tl.sum((ends_G <= tile).to(tl.int32), 0)
        tiles_before = tl.sum(tl.where(group_ids < group, tiles_G, 0), 0)
        row_of_group = (tile - tiles_before) * BLOCK_M
        rows_left = tl.load(counts + group) - row_of_group
        row = (tl.load(first_rows + group) + row_of_group).to(tl.int64)
        column = column_tile * BLOCK_N

        offs_M = tl.arange(0, BLOCK_M)
        offs_N = tl.arange(0, BLOCK_N)
        offs_K = tl.arange(0, BLOCK_K)
        there_M = offs_M < rows_left
        there_N = column + offs_N < WIDTH
        gate_row = group.to(tl.int64) * (2 * WIDTH) + column
        row_ptrs = rows + row * K + (offs_M[:, None] * K + offs_K[None, :])
        gate_ptrs = weight + gate_row * K + (offs_N[:, None] * K + offs_K[None, :])
        up_ptrs = weight + (gate_row + WIDTH) * K + (offs_N[:, None] * K + offs_K[None, :])

        if WEIGHT_FIRST:
            gate = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
            up = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
        else:
            gate = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
            up = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for first in range(0, K, BLOCK_K):
            row_mask = there_M[:, None]
            weight_mask = there_N[:, None]
            if K % BLOCK_K != 0:
                there_K = first + offs_K < K
                row_mask = row_mask & there_K[None, :]
                weight_mask = weight_mask & there_K[None, :]
            values_MK = tl.load(row_ptrs, mask=row_mask, other=0.0)
            gate_NK = tl.load(gate_ptrs, mask=weight_mask, other=0.0)
            up_NK = tl.load(up_ptrs, mask=weight_mask, other=0.0)
            if WEIGHT_FIRST:
                gate = tl.dot(gate_NK, tl.trans(values_MK), gate)
                up = tl.dot(up_NK, tl.trans(values_MK), up)
            else:
                gate = tl.dot(values_MK, tl.trans(gate_NK), gate)
                up = tl.dot(values_MK, tl.trans(up_NK), up)
            row_ptrs += BLOCK_K
            gate_ptrs += BLOCK_K
            up_ptrs += BLOCK_K

        gated = gate / (1.0 + tl.exp(-gate)) * up
        if WEIGHT_FIRST:
            gated = tl.trans(gated)
        out_ptrs = out + row * WIDTH + column + (offs_M[:, None] * WIDTH + offs_N[None, :])
        inside = there_M[:, None] & there_N[None, :]
        tl.store(out_ptrs, gated.to(out.dtype.element_ty), mask=inside)
