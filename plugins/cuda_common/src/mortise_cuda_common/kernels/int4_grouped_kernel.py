"""Grouped products of bfloat16 rows with int4 weights, as Triton programs."""

# Triton compiles the source of these functions: no annotation but constexpr, and they call nothing
# but ``tl``.

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

tl: Any = importlib.import_module("triton.language") if importlib.util.find_spec("triton") else None


def product_program(  # type: ignore[no-untyped-def]
    rows,
    words,
    weight_scale,
    out,
    first_rows,
    counts,
    N: tl.constexpr,
    K: tl.constexpr,
    COLUMN_GROUPS: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILES_ABREAST: tl.constexpr,
) -> None:
    """Multiply one tile of one group's rows by one block of its expert's weight rows.

    A weight is its integer times its scale in float32, rounded once to bfloat16. It is the tensor
    core's first operand, which may lie in registers, where it is unpacked.

    Args:
        rows: pointer to bfloat16 ``[R, K]``, contiguous.
        words: pointer to int32 ``[E, N, K/8]``, contiguous; the lowest nibble is the first.
        weight_scale: pointer to float32 ``[E, N, COLUMN_GROUPS]``, contiguous.
        out: pointer to ``[R, N]``, contiguous.
        first_rows: pointer to int32 ``[E]``, the first row of each group.
        counts: pointer to int32 ``[E]``, the rows of each group.
        N: rows of a weight.
        K: columns of a weight.
        COLUMN_GROUPS: equal groups of a multiple of 8 columns that share a scale.
        NUM_GROUPS: E.
        GROUP_BLOCK: a power of two, at least E.
        BLOCK_M: rows of a tile.
        BLOCK_N: weight rows of a tile.
        BLOCK_K: columns that are multiplied at a time.
        TILES_ABREAST: tiles of rows that are computed side by side, for the sake of L2.
    """
    COLUMN_TILES: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    WORDS: tl.constexpr = K // 8
    BLOCK_WORDS: tl.constexpr = BLOCK_K // 8
    WORDS_OF_SCALE: tl.constexpr = WORDS // COLUMN_GROUPS

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
        offs_W = tl.arange(0, BLOCK_WORDS)
        shifts = (tl.arange(0, 8) * 4)[None, None, :]
        there_M = offs_M < rows_left
        there_N = column + offs_N < N
        weight_row = group.to(tl.int64) * N + column
        row_ptrs = rows + row * K + (offs_M[:, None] * K + offs_K[None, :])
        word_ptrs = words + weight_row * WORDS + (offs_N[:, None] * WORDS + offs_W[None, :])
        scale_ptrs = weight_scale + weight_row * COLUMN_GROUPS + offs_N[:, None] * COLUMN_GROUPS

        sums = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
        for first in range(0, K, BLOCK_K):
            row_mask = there_M[:, None]
            word_mask = there_N[:, None]
            if K % BLOCK_K != 0:
                row_mask = row_mask & (first + offs_K < K)[None, :]
                word_mask = word_mask & (first // 8 + offs_W < WORDS)[None, :]
            values_MK = tl.load(row_ptrs, mask=row_mask, other=0.0)
            words_NW = tl.load(word_ptrs, mask=word_mask, other=0)
            if WORDS_OF_SCALE % BLOCK_WORDS == 0:
                scale = tl.load(
                    scale_ptrs + first // 8 // WORDS_OF_SCALE, mask=there_N[:, None], other=0.0
                )
            else:
                scale_W = (first // 8 + offs_W) // WORDS_OF_SCALE
                scale = tl.load(scale_ptrs + scale_W[None, :], mask=word_mask, other=0.0)
            # 2^23 + n in float32 has the bits of n at its end, so nothing need be converted.
            nibbles = ((words_NW[:, :, None] >> shifts) & 0xF) ^ 0x8
            integers = (nibbles | 0x4B000000).to(tl.float32, bitcast=True) - 8388616.0
            weight_NK = (integers * scale[:, :, None]).to(tl.bfloat16)
            weight_NK = tl.reshape(weight_NK, (BLOCK_N, BLOCK_K))
            sums = tl.dot(weight_NK, tl.trans(values_MK), sums)
            row_ptrs += BLOCK_K
            word_ptrs += BLOCK_WORDS

        sums = tl.trans(sums)
        out_ptrs = out + row * N + column + (offs_M[:, None] * N + offs_N[None, :])
        inside = there_M[:, None] & there_N[None, :]
        tl.store(out_ptrs, sums.to(out.dtype.element_ty), mask=inside)


def gate_up_program(  # type: ignore[no-untyped-def]
    rows,
    words,
    weight_scale,
    out,
    first_rows,
    counts,
    WIDTH: tl.constexpr,
    K: tl.constexpr,
    COLUMN_GROUPS: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILES_ABREAST: tl.constexpr,
) -> None:
    """Multiply one tile of one group's rows by as many rows of gate as of up, and gate them.

    Nothing is rounded between the sums and the result: silu(gate) * up is taken in float32.

    Args:
        rows: pointer to bfloat16 ``[R, K]``, contiguous.
        words: pointer to int32 ``[E, 2 * WIDTH, K/8]``, contiguous: gate over up.
        weight_scale: pointer to float32 ``[E, 2 * WIDTH, COLUMN_GROUPS]``, contiguous.
        out: pointer to ``[R, WIDTH]``, contiguous.
        first_rows: pointer to int32 ``[E]``, the first row of each group.
        counts: pointer to int32 ``[E]``, the rows of each group.
        WIDTH: columns of the result.
        K: columns of a weight.
        COLUMN_GROUPS: equal groups of a multiple of 8 columns that share a scale.
        NUM_GROUPS: E.
        GROUP_BLOCK: a power of two, at least E.
        BLOCK_M: rows of a tile.
        BLOCK_N: columns of the result in a tile.
        BLOCK_K: columns that are multiplied at a time.
        TILES_ABREAST: tiles of rows that are computed side by side, for the sake of L2.
    """
    COLUMN_TILES: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
    WORDS: tl.constexpr = K // 8
    BLOCK_WORDS: tl.constexpr = BLOCK_K // 8
    WORDS_OF_SCALE: tl.constexpr = WORDS // COLUMN_GROUPS

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
        offs_W = tl.arange(0, BLOCK_WORDS)
        shifts = (tl.arange(0, 8) * 4)[None, None, :]
        there_M = offs_M < rows_left
        there_N = column + offs_N < WIDTH
        gate_row = group.to(tl.int64) * (2 * WIDTH) + column
        row_ptrs = rows + row * K + (offs_M[:, None] * K + offs_K[None, :])
        gate_ptrs = words + gate_row * WORDS + (offs_N[:, None] * WORDS + offs_W[None, :])
        gate_scale_ptrs = weight_scale + gate_row * COLUMN_GROUPS + offs_N[:, None] * COLUMN_GROUPS

        gate = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
        up = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
        for first in range(0, K, BLOCK_K):
            row_mask = there_M[:, None]
            word_mask = there_N[:, None]
            if K % BLOCK_K != 0:
                row_mask = row_mask & (first + offs_K < K)[None, :]
                word_mask = word_mask & (first // 8 + offs_W < WORDS)[None, :]
            values_MK = tl.load(row_ptrs, mask=row_mask, other=0.0)
            gate_NW = tl.load(gate_ptrs, mask=word_mask, other=0)
            up_NW = tl.load(gate_ptrs + WIDTH * WORDS, mask=word_mask, other=0)
            if WORDS_OF_SCALE % BLOCK_WORDS == 0:
                scale_ptrs = gate_scale_ptrs + first // 8 // WORDS_OF_SCALE
                scale_mask = there_N[:, None]
            else:
                scale_ptrs = gate_scale_ptrs + ((first // 8 + offs_W) // WORDS_OF_SCALE)[None, :]
                scale_mask = word_mask
            gate_scale = tl.load(scale_ptrs, mask=scale_mask, other=0.0)
            up_scale = tl.load(scale_ptrs + WIDTH * COLUMN_GROUPS, mask=scale_mask, other=0.0)
            # 2^23 + n in float32 has the bits of n at its end, so nothing need be converted.
            nibbles = ((gate_NW[:, :, None] >> shifts) & 0xF) ^ 0x8
            integers = (nibbles | 0x4B000000).to(tl.float32, bitcast=True) - 8388616.0
            gate_NK = (integers * gate_scale[:, :, None]).to(tl.bfloat16)
            gate = tl.dot(tl.reshape(gate_NK, (BLOCK_N, BLOCK_K)), tl.trans(values_MK), gate)
            nibbles = ((up_NW[:, :, None] >> shifts) & 0xF) ^ 0x8
            integers = (nibbles | 0x4B000000).to(tl.float32, bitcast=True) - 8388616.0
            up_NK = (integers * up_scale[:, :, None]).to(tl.bfloat16)
            up = tl.dot(tl.reshape(up_NK, (BLOCK_N, BLOCK_K)), tl.trans(values_MK), up)
            row_ptrs += BLOCK_K
            gate_ptrs += BLOCK_WORDS

        gated = tl.trans(gate / (1.0 + tl.exp(-gate)) * up)
        out_ptrs = out + row * WIDTH + column + (offs_M[:, None] * WIDTH + offs_N[None, :])
        inside = there_M[:, None] & there_N[None, :]
        tl.store(out_ptrs, gated.to(out.dtype.element_ty), mask=inside)
