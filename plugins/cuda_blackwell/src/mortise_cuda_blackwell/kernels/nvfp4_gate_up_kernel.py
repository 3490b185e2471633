"""Gate and up in float4, SwiGLU and the quantisation of its result as one Triton program."""

# Triton compiles the source of this function, and looks at every name in it: so there is no other
# annotation than constexpr, and it calls nothing but ``tl``, which whoever runs it puts in place.

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

tl: Any = importlib.import_module("triton.language") if importlib.util.find_spec("triton") else None


def gate_up_kernel(  # type: ignore[no-untyped-def]
    rows,
    row_scales,
    weight,
    weight_scales,
    alphas,
    row_alpha,
    divisors,
    values,
    scales,
    first_rows,
    counts,
    row_stride,
    scale_row_stride,
    scale_column_stride,
    PART_ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
) -> None:
    """Multiply one block of rows by 128 rows of gate and of up, and quantise their SwiGLU.

    The weight is the first operand, which is 128 rows high: the second can be as few as 16.
    Sums, silu and its product with up are rounded to bfloat16, as they are where each of the three
    steps is a program of its own, and quantised in the order of ``mortise.formats.nvfp4``.

    Args:
        rows: pointer to uint8 ``[R, COLUMNS / 2]``; columns are adjacent.
        row_scales: pointer to float8 e4m3 ``[R, COLUMNS / 16]``; strides are free.
        weight: pointer to uint8 ``[E, 2 * PART_ROWS, COLUMNS / 2]``, gate over up.
        weight_scales: pointer to float8 e4m3, of each expert and part in tiles of 128 rows by 4
            columns (``mortise.formats.nvfp4.swizzle_scales``).
        alphas: pointer to float32 ``[E, 2]``, factors of the sums of gate and of up.
        row_alpha: one more factor of all of them.
        divisors: pointer to float32 ``[E]``, the reciprocal of the result's global scale.
        values: pointer to the result, uint8 ``[R, PART_ROWS / 2]``.
        scales: pointer to its scales, float8 e4m3 ``[R, PART_ROWS / 16]``.
        first_rows: pointer to int32, the first row of each group.
        counts: pointer to int32, the rows of each group.
        row_stride: bytes from one row to the next.
        scale_row_stride: scales from one row to the next.
        scale_column_stride: scales from one column to the next.
        PART_ROWS: I, rows of gate and of up, a multiple of 16.
        COLUMNS: H, a multiple of 16.
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
    tile = tl.program_id(0) // PART_TILES
    if tile < tl.sum(group_tiles, 0):
        group = tl.sum((ends <= tile).to(tl.int32), 0)
        before = tl.sum(tl.where(groups < group, group_tiles, 0), 0)
        inner = (tile - before) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        there = inner < tl.load(counts + group)
        row = (tl.load(first_rows + group) + inner).to(tl.int64)
        part_tile = tl.program_id(0) % PART_TILES
        expert = group.to(tl.int64)
        # 128 rows of gate, then the 128 of up that belong to them: one product of 256.
        both = tl.arange(0, 256)
        part_row = part_tile * 128 + both % 128
        weight_there = part_row < PART_ROWS
        weight_row = (expert * 2 + both // 128) * PART_ROWS + part_row
        parts = tl.arange(0, 2)
        scale_tile = ((expert * 2 + parts) * PART_TILES + part_tile) * (COLUMN_TILES * 512)

        sums = tl.zeros((256, BLOCK_ROWS), dtype=tl.float32)
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
            source = weight_scales + scale_tile[:, None] + place[None, :]
            inside = (parts >= 0)[:, None] & (place < COLUMN_TILES * 512)[None, :]
            scales_N = tl.load(source, mask=inside, other=0.0)
            scales_N = tl.reshape(scales_N, (2, BLOCK_COLUMNS // 64, 32, 4, 4))
            scales_N = tl.permute(scales_N, (0, 3, 2, 1, 4))
            scales_N = tl.reshape(scales_N, (256, BLOCK_COLUMNS // 16))
            sums = tl.dot_scaled(
                block_NK, scales_N, "e2m1", tl.trans(block_RK), scales_R, "e2m1", sums
            )

        gate, up = tl.split(tl.permute(tl.reshape(sums, (2, 128, BLOCK_ROWS)), (2, 1, 0)))
        gate = gate * (row_alpha * tl.load(alphas + expert * 2))
        gate = gate.to(tl.bfloat16).to(tl.float32)
        up = up * (row_alpha * tl.load(alphas + expert * 2 + 1))
        up = up.to(tl.bfloat16).to(tl.float32)
        silu = tl.div_rn(gate, 1.0 + tl.exp(-gate)).to(tl.bfloat16).to(tl.float32)
        number = (silu * up).to(tl.bfloat16).to(tl.float32)

        divisor = tl.load(divisors + expert)
        block = tl.reshape(number, (BLOCK_ROWS, 8, 16))
        largest = tl.max(tl.abs(block), 2)
        # 0, or NaN where the block has one: comparisons of the chip drop it.
        broken = tl.abs(tl.sum(tl.where(block == block, 0.0, block), 2))
        scale = tl.minimum(divisor * (largest * (1 / 6)), 448.0) + broken
        scale = scale.to(tl.float8e4nv)
        scale_f32 = scale.to(tl.float32)
        used = tl.where(scale_f32 == 0.0, 1.0, scale_f32)
        factor = tl.minimum(tl.div_rn(1.0, used * tl.div_rn(1.0, divisor)), 3.4028234663852886e38)
        factor = tl.where(scale_f32 == 0.0, 0.0, factor) + broken
        scaled = tl.reshape(block * tl.expand_dims(factor, 2), (BLOCK_ROWS, 64, 2))
        size = tl.abs(scaled)
        code = (size > 0.25).to(tl.int32) + (size >= 0.75).to(tl.int32)
        code += (size > 1.25).to(tl.int32) + (size >= 1.75).to(tl.int32)
        code += (size > 2.5).to(tl.int32) + (size >= 3.5).to(tl.int32)
        code += (size > 5.0).to(tl.int32)
        code += tl.where(scaled.to(tl.int32, bitcast=True) < 0, 8, 0)
        code = tl.where(scaled == scaled, code, 7)
        low, high = tl.split(code)
        pair = part_tile * 64 + tl.arange(0, 64)
        inside = there[:, None] & (pair < PART_ROWS // 2)[None, :]
        target = values + row[:, None] * (PART_ROWS // 2) + pair[None, :]
        tl.store(target, (low + high * 16).to(tl.uint8), mask=inside)
        column = part_tile * 8 + tl.arange(0, 8)
        inside = there[:, None] & (column < PART_ROWS // 16)[None, :]
        tl.store(scales + row[:, None] * (PART_ROWS // 16) + column[None, :], scale, mask=inside)
