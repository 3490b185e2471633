"""Rows of tokens to groups of their experts and back, as Triton programs."""

# Triton compiles the source of these functions: no annotation but constexpr, and they call nothing
# but ``tl``.

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

tl: Any = importlib.import_module("triton.language") if importlib.util.find_spec("triton") else None


def rank_program(  # type: ignore[no-untyped-def]
    expert_ids,
    ranks,
    counts,
    num_choices,
    BLOCK: tl.constexpr,
) -> None:
    """Number the choices of one expert in their order; one program for each expert.

    Args:
        expert_ids: pointer to int32 or int64 ``[T * K]``.
        ranks: pointer to int32 ``[T * K]``: which of its expert's choices each is; those of no
            local expert are not written.
        counts: pointer to int32 ``[E]``, the choices of each expert.
        num_choices: T * K.
        BLOCK: choices that are looked at together.
    """
    expert = tl.program_id(0)
    offs_C = tl.arange(0, BLOCK)
    count = 0
    for first in range(0, num_choices, BLOCK):
        choices_C = first + offs_C
        ids_C = tl.load(expert_ids + choices_C, mask=choices_C < num_choices, other=-1)
        is_ours_C = ids_C == expert
        ours_C = is_ours_C.to(tl.int32)
        tl.store(ranks + choices_C, count + tl.cumsum(ours_C, 0) - ours_C, mask=is_ours_C)
        count += tl.sum(ours_C, 0)
    tl.store(counts + expert, count)


def permute_program(  # type: ignore[no-untyped-def]
    hidden,
    expert_ids,
    ranks,
    counts,
    first_rows,
    row_of,
    out,
    out_scales,
    row_stride,
    out_scale_step,
    WIDTH: tl.constexpr,
    CHOICES: tl.constexpr,
    CHOICE_BLOCK: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    CAPACITY: tl.constexpr,
    QUANTISED: tl.constexpr,
    POWERS_OF_TWO: tl.constexpr,
    COLUMN_GROUPS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Bring some columns of one token to its row in the group of each of its experts.

    A token is quantised once, however many experts it goes to.

    Args:
        hidden: pointer to ``[T, WIDTH]``, bfloat16 or float32; rows may be apart.
        expert_ids: pointer to int32 or int64 ``[T, CHOICES]``, contiguous; local experts, others
            are none.
        ranks: pointer to int32 ``[T, CHOICES]`` that ``rank_program`` wrote.
        counts: pointer to int32 ``[E]`` that ``rank_program`` wrote.
        first_rows: pointer to int32 ``[E]``, written here.
        row_of: pointer to int32 ``[T, CHOICES]``, written here: the row of each choice, or -1.
        out: pointer to ``[R, WIDTH]``, contiguous; e4m3 where it is quantised.
        out_scales: pointer to float32, one for a row and 128 columns, column after column.
        row_stride: from one token to the next.
        out_scale_step: from one column of ``out_scales`` to the next.
        WIDTH: columns of the result.
        CHOICES: experts of a token.
        CHOICE_BLOCK: a power of two, at least CHOICES.
        NUM_GROUPS: E.
        GROUP_BLOCK: a power of two, at least E.
        ALIGNMENT: every group begins at a multiple of it.
        CAPACITY: rows of each group's slot where rows are masked, else 0.
        QUANTISED: to e4m3, as ``mortise.formats.fp8``.
        POWERS_OF_TWO: whether the scales are.
        COLUMN_GROUPS: groups of columns of a program, a power of two.
        COLUMNS: 128, the columns of a group.
    """
    COLUMN_TILES: tl.constexpr = (WIDTH + COLUMN_GROUPS * COLUMNS - 1) // (COLUMN_GROUPS * COLUMNS)
    token = tl.program_id(0) // COLUMN_TILES
    column_tile = tl.program_id(0) % COLUMN_TILES

    group_ids = tl.arange(0, GROUP_BLOCK)
    counts_G = tl.load(counts + group_ids, mask=group_ids < NUM_GROUPS, other=0)
    if CAPACITY > 0:
        first_G = group_ids * CAPACITY
    else:
        padded_G = (counts_G + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
        first_G = tl.cumsum(padded_G, 0) - padded_G
    if tl.program_id(0) == 0:
        tl.store(first_rows + group_ids, first_G, mask=group_ids < NUM_GROUPS)

    offs_C = tl.arange(0, CHOICE_BLOCK)
    choices_C = token.to(tl.int64) * CHOICES + offs_C
    ids_C = tl.load(expert_ids + choices_C, mask=offs_C < CHOICES, other=-1)
    is_local_C = (ids_C >= 0) & (ids_C < NUM_GROUPS)
    ranks_C = tl.load(ranks + choices_C, mask=is_local_C, other=0)
    is_group_CG = ids_C[:, None] == group_ids[None, :]
    row_C = tl.sum(tl.where(is_group_CG, first_G[None, :], 0), 1) + ranks_C
    if column_tile == 0:
        tl.store(row_of + choices_C, tl.where(is_local_C, row_C, -1), mask=offs_C < CHOICES)

    offs_A = column_tile * COLUMN_GROUPS + tl.arange(0, COLUMN_GROUPS)
    offs_AN = offs_A[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside_AN = offs_AN < WIDTH
    values_AN = tl.load(
        hidden + token.to(tl.int64) * row_stride + offs_AN, mask=inside_AN, other=0.0
    )
    if QUANTISED:
        values_AN = values_AN.to(tl.float32)
        is_number = values_AN == values_AN
        amax_A = tl.max(tl.where(is_number, tl.abs(values_AN), 0.0), 1)
        all_numbers_A = tl.min(is_number.to(tl.int32), 1) != 0
        scale_A = tl.div_rn(tl.maximum(amax_A, 1e-10), 448.0)
        scale_A = tl.where(all_numbers_A, scale_A, float("nan"))
        if POWERS_OF_TWO:
            bits_A = scale_A.to(tl.int32, bitcast=True)
            exponent_A = (bits_A >> 23) & 0xFF
            exponent_A += ((bits_A & 0x7FFFFF) != 0).to(tl.int32)
            exponent_A = tl.minimum(tl.maximum(exponent_A, 1), 254)
            scale_A = (exponent_A << 23).to(tl.float32, bitcast=True)
        scaled = values_AN * tl.div_rn(1.0, scale_A)[:, None]
        clamped = tl.minimum(tl.maximum(scaled, -448.0), 448.0)
        values_AN = tl.where(scaled == scaled, clamped, float("nan")).to(tl.float8e4nv)
    for choice in tl.static_range(CHOICES):
        is_choice = offs_C == choice
        row = tl.sum(tl.where(is_choice & is_local_C, row_C, 0), 0).to(tl.int64)
        is_local = tl.sum((is_choice & is_local_C).to(tl.int32), 0) != 0
        tl.store(out + row * WIDTH + offs_AN, values_AN, mask=inside_AN & is_local)
        if QUANTISED:
            scale_ptrs = out_scales + offs_A.to(tl.int64) * out_scale_step + row
            tl.store(scale_ptrs, scale_A, mask=(offs_A * COLUMNS < WIDTH) & is_local)


def unpermute_program(  # type: ignore[no-untyped-def]
    rows,
    row_of,
    weights,
    out,
    WIDTH: tl.constexpr,
    CHOICES: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Weight and sum some columns of one token's rows in float32, in the order of its choices.

    Args:
        rows: pointer to ``[R, WIDTH]``, contiguous, bfloat16 or float32.
        row_of: pointer to int32 ``[T, CHOICES]``, contiguous; -1 is none.
        weights: pointer to float32 ``[T, CHOICES]``, contiguous.
        out: pointer to ``[T, WIDTH]``, contiguous.
        WIDTH: columns of the result.
        CHOICES: experts of a token.
        COLUMNS: of a program, a power of two.
    """
    COLUMN_TILES: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    token = (tl.program_id(0) // COLUMN_TILES).to(tl.int64)
    offs_N = tl.program_id(0) % COLUMN_TILES * COLUMNS + tl.arange(0, COLUMNS)
    inside = offs_N < WIDTH
    sums = tl.zeros((COLUMNS,), dtype=tl.float32)
    for choice in tl.static_range(CHOICES):
        row = tl.load(row_of + token * CHOICES + choice).to(tl.int64)
        is_there = row >= 0
        weight = tl.load(weights + token * CHOICES + choice, mask=is_there, other=0.0)
        values = tl.load(rows + row * WIDTH + offs_N, mask=inside & is_there, other=0.0)
        sums += weight * values.to(tl.float32)
    tl.store(out + token * WIDTH + offs_N, sums.to(out.dtype.element_ty), mask=inside)
