"""The product of float4 rows with float4 weights of their experts as one Triton program."""

# Triton compiles the source of this function, and looks at every name in it: so there is no other
# annotation than constexpr, and it calls nothing but ``tl``, which whoever runs it puts in place.

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

tl: Any = importlib.import_module("triton.language") if importlib.util.find_spec("triton") else None


def product_kernel(  # type: ignore[no-untyped-def]
    rows,
    row_scales,
    weight,
    weight_scales,
    alphas,
    row_alpha,
    output,
    first_rows,
    counts,
    row_stride,
    scale_row_stride,
    scale_column_stride,
    PART_ROWS: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    OUTPUT_BF16: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
) -> None:
    """Multiply one block of rows of one group by 128 rows of one part of its expert's weight.

    The block scales are factors of the tensor core's own product; the global scales multiply its
    float32 sums, those of each part by its own, so that gate and up keep different ones. The weight
    is the first operand, which is 128 rows high: the second can be as few as 16.

    Args:
        rows: pointer to uint8 ``[R, COLUMNS / 2]``; columns are adjacent.
        row_scales: pointer to float8 e4m3 ``[R, COLUMNS / 16]``; strides are free.
        weight: pointer to uint8 ``[E, NUM_PARTS * PART_ROWS, COLUMNS / 2]``.
        weight_scales: pointer to float8 e4m3, of each expert and part in tiles of 128 rows by 4
            columns (``mortise.formats.nvfp4.swizzle_scales``).
        alphas: pointer to float32 ``[E, NUM_PARTS]``, factors of the sums.
        row_alpha: one more factor of all of them.
        output: pointer to bfloat16 or float32 ``[R, NUM_PARTS * PART_ROWS]``.
        first_rows: pointer to int32, the first row of each group.
        counts: pointer to int32, the rows of each group.
        row_stride: bytes from one row to the next.
        scale_row_stride: scales from one row to the next.
        scale_column_stride: scales from one column to the next.
        PART_ROWS: rows of the weight that were one projection.
        NUM_PARTS: how many were.
        COLUMNS: K, a multiple of 16.
        OUTPUT_BF16: the result is bfloat16.
        NUM_GROUPS: E, groups.
        GROUP_BLOCK: a power of two, no smaller.
        BLOCK_ROWS: rows of a block.
        BLOCK_COLUMNS: columns of a block, a multiple of 64.
    """
    PART_TILES: tl.constexpr = (PART_ROWS + 127) // 128
    COLUMN_TILES: tl.constexpr = (COLUMNS + 63) // 64
    groups = tl.arange(0, GROUP_BLOCK)
    group_counts = tl.load(counts + groups, mask=groups < NUM_GROUPS, other=0)
    group_tiles = (group_counts + BLOCK_ROWS - 1) // BLOCK_ROWS
    ends = tl.cumsum(group_tiles, 0)
    tile = tl.program_id(0) // (NUM_PARTS * PART_TILES)
    if tile < tl.sum(group_tiles, 0):
        group = tl.sum((ends <= tile).to(tl.int32), 0)
        before = tl.sum(tl.where(groups < group, group_tiles, 0), 0)
        inner = (tile - before) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        there = inner < tl.load(counts + group)
        row = (tl.load(first_rows + group) + inner).to(tl.int64)
        part_tile = tl.program_id(0) % (NUM_PARTS * PART_TILES)
        part = part_tile // PART_TILES
        part_row = part_tile % PART_TILES * 128 + tl.arange(0, 128)
        weight_there = part_row < PART_ROWS
        expert = group.to(tl.int64)
        weight_row = (expert * NUM_PARTS + part) * PART_ROWS + part_row
        scale_tile = (expert * (NUM_PARTS * PART_TILES) + part_tile) * (COLUMN_TILES * 512)

        sums = tl.zeros((128, BLOCK_ROWS), dtype=tl.float32)
        for start in range(0, COLUMNS, BLOCK_COLUMNS):
            pair = start // 2 + tl.arange(0, BLOCK_COLUMNS // 2)
            inside = pair < COLUMNS // 2
            block_RK = tl.load(
                rows + row[:, None] * row_stride + pair[None, :],
                mask=there[:, None] & inside[None, :],
                other=0,
            )
            block_NK = tl.load(
                weight + weight_row[:, None] * (COLUMNS // 2) + pair[None, :],
                mask=weight_there[:, None] & inside[None, :],
                other=0,
            )
            column = (start // 16 + tl.arange(0, BLOCK_COLUMNS // 16)).to(tl.int64)
            scale_place = row[:, None] * scale_row_stride + column[None, :] * scale_column_stride
            scales_R = tl.load(
                row_scales + scale_place,
                mask=there[:, None] & (column < COLUMNS // 16)[None, :],
                other=0.0,
            )
            place = start * 8 + tl.arange(0, BLOCK_COLUMNS * 8)
            scales_N = tl.load(
                weight_scales + scale_tile + place, mask=place < COLUMN_TILES * 512, other=0.0
            )
            scales_N = tl.reshape(scales_N, (BLOCK_COLUMNS // 64, 32, 4, 4))
            scales_N = tl.reshape(tl.permute(scales_N, (2, 1, 0, 3)), (128, BLOCK_COLUMNS // 16))
            sums = tl.dot_scaled(
                block_NK, scales_N, "e2m1", tl.trans(block_RK), scales_R, "e2m1", sums
            )

        result = tl.trans(sums) * (row_alpha * tl.load(alphas + expert * NUM_PARTS + part))
        if OUTPUT_BF16:
            result = result.to(tl.bfloat16)
        target = output + row[:, None] * (NUM_PARTS * PART_ROWS) + part * PART_ROWS
        tl.store(target + part_row[None, :], result, mask=there[:, None] & weight_there[None, :])
