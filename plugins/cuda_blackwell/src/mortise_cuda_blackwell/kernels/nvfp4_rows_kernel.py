"""The quantisation of rows to NVFP4, of plain ones or of gate and up, as one Triton program."""

# Triton compiles the source of this function, and looks at every name in it: so there is no other
# annotation than constexpr, and it calls nothing but ``tl``, which whoever runs it puts in place.

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

tl: Any = importlib.import_module("triton.language") if importlib.util.find_spec("triton") else None


def quantise_kernel(  # type: ignore[no-untyped-def]
    rows,
    values,
    scales,
    divisors,
    first_rows,
    counts,
    ROW_STRIDE: tl.constexpr,
    COLUMNS: tl.constexpr,
    SWIGLU: tl.constexpr,
    ROUNDED: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
) -> None:
    """Quantise one block of rows of one group, some of its columns.

    The arithmetic is that of ``mortise.formats.nvfp4``, in its order: exact quotients, ties of e2m1
    told by comparisons. NaN makes the scale of its block NaN.

    Args:
        rows: pointer to bfloat16 or float32 ``[R, COLUMNS]``, or gate and up beside one another.
        values: pointer to uint8 ``[R, COLUMNS / 2]``.
        scales: pointer to float8 e4m3 ``[R, COLUMNS / 16]``.
        divisors: pointer to float32, one a group: the reciprocal of its global scale.
        first_rows: pointer to int32, the first row of each group.
        counts: pointer to int32, the rows of each group.
        ROW_STRIDE: numbers from one row to the next.
        COLUMNS: K, a multiple of 16.
        SWIGLU: rows are gate over columns 0 to K, and up over the next K.
        ROUNDED: what SwiGLU computes is rounded to bfloat16 as often as tensors of torch are.
        NUM_GROUPS: groups.
        GROUP_BLOCK: a power of two, no smaller.
        BLOCK_ROWS: rows of a block.
        BLOCK_COLUMNS: columns of a block, a multiple of 16.
    """
    groups = tl.arange(0, GROUP_BLOCK)
    group_counts = tl.load(counts + groups, mask=groups < NUM_GROUPS, other=0)
    group_tiles = (group_counts + BLOCK_ROWS - 1) // BLOCK_ROWS
    ends = tl.cumsum(group_tiles, 0)
    COLUMN_BLOCKS: tl.constexpr = (COLUMNS + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
    tile = tl.program_id(0) // COLUMN_BLOCKS
    if tile < tl.sum(group_tiles, 0):
        group = tl.sum((ends <= tile).to(tl.int32), 0)
        before = tl.sum(tl.where(groups < group, group_tiles, 0), 0)
        inner = (tile - before) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        there = inner < tl.load(counts + group)
        row = (tl.load(first_rows + group) + inner).to(tl.int64)
        divisor = tl.load(divisors + group)
        undivisor = tl.div_rn(1.0, divisor)
        start = tl.program_id(0) % COLUMN_BLOCKS * BLOCK_COLUMNS
        column = start + tl.arange(0, BLOCK_COLUMNS)
        inside = there[:, None] & (column[None, :] < COLUMNS)
        source = rows + row[:, None] * ROW_STRIDE + column[None, :]
        number = tl.load(source, mask=inside, other=0.0).to(tl.float32)
        if SWIGLU:
            up = tl.load(source + COLUMNS, mask=inside, other=0.0).to(tl.float32)
            silu = tl.div_rn(number, 1.0 + tl.exp(-number))
            if ROUNDED:
                silu = silu.to(tl.bfloat16).to(tl.float32)
                number = (silu * up).to(tl.bfloat16).to(tl.float32)
            else:
                number = silu * up
        block = tl.reshape(number, (BLOCK_ROWS, BLOCK_COLUMNS // 16, 16))
        largest = tl.max(tl.abs(block), 2)
        # 0, or NaN where the block has one: comparisons of the chip drop it.
        broken = tl.abs(tl.sum(tl.where(block == block, 0.0, block), 2))
        scale = tl.minimum(divisor * (largest * (1 / 6)), 448.0) + broken
        scale = scale.to(tl.float8e4nv)
        scale_f32 = scale.to(tl.float32)
        used = tl.where(scale_f32 == 0.0, 1.0, scale_f32)
        # A quotient that would be infinite is the largest float32.
        factor = tl.minimum(tl.div_rn(1.0, used * undivisor), 3.4028234663852886e38)
        factor = tl.where(scale_f32 == 0.0, 0.0, factor) + broken
        scaled = tl.reshape(block * tl.expand_dims(factor, 2), (BLOCK_ROWS, BLOCK_COLUMNS // 2, 2))
        size = tl.abs(scaled)
        code = (size > 0.25).to(tl.int32) + (size >= 0.75).to(tl.int32)
        code += (size > 1.25).to(tl.int32) + (size >= 1.75).to(tl.int32)
        code += (size > 2.5).to(tl.int32) + (size >= 3.5).to(tl.int32)
        code += (size > 5.0).to(tl.int32)
        code += tl.where(scaled.to(tl.int32, bitcast=True) < 0, 8, 0)
        code = tl.where(scaled == scaled, code, 7)
        low, high = tl.split(code)
        pair = start // 2 + tl.arange(0, BLOCK_COLUMNS // 2)
        inside = there[:, None] & (pair[None, :] < COLUMNS // 2)
        target = values + row[:, None] * (COLUMNS // 2) + pair[None, :]
        tl.store(target, (low + high * 16).to(tl.uint8), mask=inside)
        part = start // 16 + tl.arange(0, BLOCK_COLUMNS // 16)
        inside = there[:, None] & (part[None, :] < COLUMNS // 16)
        tl.store(scales + row[:, None] * (COLUMNS // 16) + part[None, :], scale, mask=inside)
