"""Grouped products of e4m3 rows with e4m3 weights in blocks, as Triton programs."""

# Triton compiles the source of these functions: no annotation but constexpr, and they call nothing
# but ``tl``. So each begins with the same search for its group.

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

tl: Any = importlib.import_module("triton.language") if importlib.util.find_spec("triton") else None


def product_program(  # type: ignore[no-untyped-def]
    rows,
    row_scales,
    weight,
    weight_scale,
    out,
    first_rows,
    counts,
    scale_row_step,
    scale_column_step,
    N: tl.constexpr,
    K: tl.constexpr,
    PARTS: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WEIGHT_FIRST: tl.constexpr,
    TILES_ABREAST: tl.constexpr,
) -> None:
    """Multiply one tile of one group's rows by one block of its expert's weight rows.

    The tensor core sums 128 columns, whose sum is scaled and added up in float32.

    Args:
        rows: pointer to e4m3 ``[R, K]``, contiguous.
        row_scales: pointer to float32 ``[R, ceil(K/128)]`` of any strides.
        weight: pointer to e4m3 ``[E, N, K]``, contiguous.
        weight_scale: pointer to float32 ``[E, PARTS * ceil(N/PARTS/128), ceil(K/128)]``,
            contiguous.
        out: pointer to ``[R, N]``, contiguous.
        first_rows: pointer to int32 ``[E]``, the first row of each group.
        counts: pointer to int32 ``[E]``, the rows of each group.
        scale_row_step: from one row of ``row_scales`` to the next.
        scale_column_step: from one column of ``row_scales`` to the next.
        N: rows of a weight.
        K: columns of a weight.
        PARTS: equal parts of N with blocks of weight rows of their own.
        NUM_GROUPS: E.
        GROUP_BLOCK: a power of two, at least E.
        BLOCK_M: rows of a tile.
        BLOCK_N: weight rows of a tile, at most 128 and a divisor of it.
        BLOCK_K: 128, the columns that share a scale.
        WEIGHT_FIRST: whether the weight is the tensor core's first operand, which is 64 high or
            more, as few rows are not.
        TILES_ABREAST: tiles of rows that are computed side by side, for the sake of L2.
    """
    PART: tl.constexpr = N // PARTS
    PART_TILES: tl.constexpr = (PART + BLOCK_N - 1) // BLOCK_N
    PART_BLOCKS: tl.constexpr = (PART + 127) // 128
    K_BLOCKS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    COLUMN_TILES: tl.constexpr = PARTS * PART_TILES

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
        part = column_tile // PART_TILES
        first_of_part = column_tile % PART_TILES * BLOCK_N

        offs_M = tl.arange(0, BLOCK_M)
        offs_N = tl.arange(0, BLOCK_N)
        offs_K = tl.arange(0, BLOCK_K)
        there_M = offs_M < rows_left
        there_N = first_of_part + offs_N < PART
        weight_row = group.to(tl.int64) * N + part * PART + first_of_part
        scale_block = part * PART_BLOCKS + first_of_part // 128
        scale_row = group.to(tl.int64) * (PARTS * PART_BLOCKS) + scale_block
        row_ptrs = rows + row * K + (offs_M[:, None] * K + offs_K[None, :])
        weight_ptrs = weight + weight_row * K + (offs_N[:, None] * K + offs_K[None, :])
        row_scale_ptrs = row_scales + (row + offs_M) * scale_row_step
        weight_scale_ptr = weight_scale + scale_row * K_BLOCKS

        if WEIGHT_FIRST:
            sums = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
        else:
            sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        # Triton loads operands ahead of the tensor core, but not scales: they are one block ahead.
        next_row_scale_M = tl.load(row_scale_ptrs, mask=there_M, other=0.0)
        next_weight_scale = tl.load(weight_scale_ptr)
        for block in range(K_BLOCKS):
            row_mask = there_M[:, None]
            weight_mask = there_N[:, None]
            if K % BLOCK_K != 0:
                there_K = block * BLOCK_K + offs_K < K
                row_mask = row_mask & there_K[None, :]
                weight_mask = weight_mask & there_K[None, :]
            values_MK = tl.load(row_ptrs, mask=row_mask, other=0.0)
            weight_NK = tl.load(weight_ptrs, mask=weight_mask, other=0.0)
            scale_M = next_row_scale_M * next_weight_scale
            row_scale_ptrs += scale_column_step
            weight_scale_ptr += 1
            more = block + 1 < K_BLOCKS
            next_row_scale_M = tl.load(row_scale_ptrs, mask=there_M & more, other=0.0)
            next_weight_scale = tl.load(weight_scale_ptr, mask=more, other=0.0)
            if WEIGHT_FIRST:
                sums += tl.dot(weight_NK, tl.trans(values_MK)) * scale_M[None, :]
            else:
                sums += tl.dot(values_MK, tl.trans(weight_NK)) * scale_M[:, None]
            row_ptrs += BLOCK_K
            weight_ptrs += BLOCK_K

        if WEIGHT_FIRST:
            sums = tl.trans(sums)
        column = part * PART + first_of_part
        out_ptrs = out + row * N + column + (offs_M[:, None] * N + offs_N[None, :])
        tl.store(out_ptrs, sums.to(out.dtype.element_ty), mask=there_M[:, None] & there_N[None, :])


def gate_up_program(  # type: ignore[no-untyped-def]
    rows,
    row_scales,
    weight,
    weight_scale,
    out,
    out_scales,
    first_rows,
    counts,
    scale_row_step,
    scale_column_step,
    out_scale_step,
    WIDTH: tl.constexpr,
    K: tl.constexpr,
    QUANTISED: tl.constexpr,
    POWERS_OF_TWO: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WEIGHT_FIRST: tl.constexpr,
    TILES_ABREAST: tl.constexpr,
) -> None:
    """Multiply one tile of one group's rows by 128 rows of gate and the same of up, and gate them.

    Nothing is rounded between the sums and the result: silu(gate) * up is taken in float32, and
    quantised from it.

    Args:
        rows: pointer to e4m3 ``[R, K]``, contiguous.
        row_scales: pointer to float32 ``[R, ceil(K/128)]`` of any strides.
        weight: pointer to e4m3 ``[E, 2 * WIDTH, K]``, contiguous: gate over up.
        weight_scale: pointer to float32 ``[E, 2 * ceil(WIDTH/128), ceil(K/128)]``, contiguous.
        out: pointer to ``[R, WIDTH]``, contiguous; e4m3 where it is quantised.
        out_scales: pointer to float32, one for a row and 128 columns, column after column; not
            used where the result is not quantised.
        first_rows: pointer to int32 ``[E]``, the first row of each group.
        counts: pointer to int32 ``[E]``, the rows of each group.
        scale_row_step: from one row of ``row_scales`` to the next.
        scale_column_step: from one column of ``row_scales`` to the next.
        out_scale_step: from one column of ``out_scales`` to the next.
        WIDTH: columns of the result.
        K: columns of a weight.
        QUANTISED: whether the result is.
        POWERS_OF_TWO: whether its scales are.
        NUM_GROUPS: E.
        GROUP_BLOCK: a power of two, at least E.
        BLOCK_M: rows of a tile.
        BLOCK_N: 128, the columns of the result that share a scale.
        BLOCK_K: 128, the columns that share a scale.
        WEIGHT_FIRST: whether the weight is the tensor core's first operand, which is 64 high or
            more, as few rows are not.
        TILES_ABREAST: tiles of rows that are computed side by side, for the sake of L2.
    """
    WIDTH_BLOCKS: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
    K_BLOCKS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K

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
        scale_row = group.to(tl.int64) * (2 * WIDTH_BLOCKS) + column_tile
        row_ptrs = rows + row * K + (offs_M[:, None] * K + offs_K[None, :])
        gate_ptrs = weight + gate_row * K + (offs_N[:, None] * K + offs_K[None, :])
        up_ptrs = weight + (gate_row + WIDTH) * K + (offs_N[:, None] * K + offs_K[None, :])
        row_scale_ptrs = row_scales + (row + offs_M) * scale_row_step
        gate_scale_ptr = weight_scale + scale_row * K_BLOCKS
        up_scale_ptr = gate_scale_ptr + WIDTH_BLOCKS * K_BLOCKS

        if WEIGHT_FIRST:
            gate = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
            up = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
        else:
            gate = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
            up = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        next_row_scale_M = tl.load(row_scale_ptrs, mask=there_M, other=0.0)
        next_gate_scale = tl.load(gate_scale_ptr)
        next_up_scale = tl.load(up_scale_ptr)
        for block in range(K_BLOCKS):
            row_mask = there_M[:, None]
            weight_mask = there_N[:, None]
            if K % BLOCK_K != 0:
                there_K = block * BLOCK_K + offs_K < K
                row_mask = row_mask & there_K[None, :]
                weight_mask = weight_mask & there_K[None, :]
            values_MK = tl.load(row_ptrs, mask=row_mask, other=0.0)
            gate_NK = tl.load(gate_ptrs, mask=weight_mask, other=0.0)
            up_NK = tl.load(up_ptrs, mask=weight_mask, other=0.0)
            gate_scale_M = next_row_scale_M * next_gate_scale
            up_scale_M = next_row_scale_M * next_up_scale
            row_scale_ptrs += scale_column_step
            gate_scale_ptr += 1
            up_scale_ptr += 1
            more = block + 1 < K_BLOCKS
            next_row_scale_M = tl.load(row_scale_ptrs, mask=there_M & more, other=0.0)
            next_gate_scale = tl.load(gate_scale_ptr, mask=more, other=0.0)
            next_up_scale = tl.load(up_scale_ptr, mask=more, other=0.0)
            if WEIGHT_FIRST:
                gate += tl.dot(gate_NK, tl.trans(values_MK)) * gate_scale_M[None, :]
                up += tl.dot(up_NK, tl.trans(values_MK)) * up_scale_M[None, :]
            else:
                gate += tl.dot(values_MK, tl.trans(gate_NK)) * gate_scale_M[:, None]
                up += tl.dot(values_MK, tl.trans(up_NK)) * up_scale_M[:, None]
            row_ptrs += BLOCK_K
            gate_ptrs += BLOCK_K
            up_ptrs += BLOCK_K

        gated = gate / (1.0 + tl.exp(-gate)) * up
        if WEIGHT_FIRST:
            gated = tl.trans(gated)
        out_ptrs = out + row * WIDTH + column + (offs_M[:, None] * WIDTH + offs_N[None, :])
        inside = there_M[:, None] & there_N[None, :]
        if QUANTISED:
            # As mortise.formats.fp8; a number that is none makes its whole group such.
            is_number = gated == gated
            amax_M = tl.max(tl.where(is_number, tl.abs(gated), 0.0), 1)
            all_numbers_M = tl.min(is_number.to(tl.int32), 1) != 0
            scale_M = tl.div_rn(tl.maximum(amax_M, 1e-10), 448.0)
            scale_M = tl.where(all_numbers_M, scale_M, float("nan"))
            if POWERS_OF_TWO:
                bits_M = scale_M.to(tl.int32, bitcast=True)
                exponent_M = (bits_M >> 23) & 0xFF
                exponent_M += ((bits_M & 0x7FFFFF) != 0).to(tl.int32)
                exponent_M = tl.minimum(tl.maximum(exponent_M, 1), 254)
                scale_M = (exponent_M << 23).to(tl.float32, bitcast=True)
            scaled = gated * tl.div_rn(1.0, scale_M)[:, None]
            clamped = tl.minimum(tl.maximum(scaled, -448.0), 448.0)
            values = tl.where(scaled == scaled, clamped, float("nan"))
            tl.store(out_ptrs, values.to(tl.float8e4nv), mask=inside)
            scale_ptrs = out_scales + column_tile.to(tl.int64) * out_scale_step + row + offs_M
            tl.store(scale_ptrs, scale_M, mask=there_M)
        else:
            tl.store(out_ptrs, gated.to(out.dtype.element_ty), mask=inside)
