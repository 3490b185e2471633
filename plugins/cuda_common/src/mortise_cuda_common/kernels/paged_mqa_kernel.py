"""Index scores of queries over paged keys as one Triton program for each worker of a schedule."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

tl: Any = importlib.import_module("triton.language") if importlib.util.find_spec("triton") else None


def paged_mqa_kernel(  # type: ignore[no-untyped-def]
    queries,
    keys,
    key_scales,
    weights,
    lens,
    page_table,
    schedule,
    logits,
    num_columns,
    table_pitch,
    PAGE_STRIDE: tl.constexpr,
    KEY_STRIDE: tl.constexpr,
    SCALE_STRIDE: tl.constexpr,
    TOKENS: tl.constexpr,
    ENTRY_TOKENS: tl.constexpr,
    TABLE_ROWS: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    QUANTISED: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
) -> None:
    """Score the splits between two entries of the schedule.

    It counts its splits by the lengths that it reads, and stops at the last of them whatever the
    schedule says: there is no cursor that has to meet an end.

    Args:
        queries: pointer to contiguous ``[rows * TOKENS, HEADS, DIM]``, dtype of the keys.
        keys: pointer to the first key of page 0.
        key_scales: pointer to the first float32 scale of page 0, where keys are quantised.
        weights: pointer to contiguous float32 ``[rows * TOKENS, HEADS]``.
        lens: pointer to contiguous int32 ``[rows, TOKENS]``; the last of a row counts.
        page_table: pointer to int32 pages of each TABLE_ROWS rows of lengths.
        schedule: pointer to contiguous int32 ``[workers + 1, 2]``.
        logits: pointer to contiguous float32 ``[rows * TOKENS, num_columns]``.
        num_columns: columns of the result.
        table_pitch: numbers from one row of the page table to the next.
        PAGE_STRIDE: numbers from one page's keys to the next; with KEY_STRIDE constant, as only
            then does the compiler know that keys can be loaded 16 bytes at a time.
        KEY_STRIDE: numbers from one key of a page to the next.
        SCALE_STRIDE: numbers from one page's scales to the next.
        TOKENS: queries of a row of lengths.
        ENTRY_TOKENS: what the first number of an entry is divided by for its row.
        TABLE_ROWS: rows of lengths that share a row of the page table.
        HEADS: of a query.
        DIM: of a head and of a key.
        QUANTISED: whether keys have scales.
        PAGE_SIZE: keys of a page.
        SPLIT: keys of a split.
        BLOCK_KEYS: keys of a block, by which SPLIT can be divided.
        HEAD_BLOCK: heads of a block.
        DIM_BLOCK: numbers of a block's key.
    """
    worker = tl.program_id(0)
    entry = schedule + 2 * worker
    first_row = tl.load(entry) // ENTRY_TOKENS
    first_split = tl.load(entry + 1)
    last_row = tl.load(entry + 2) // ENTRY_TOKENS
    last_split = tl.load(entry + 3)
    # The end lies before (last_row, last_split): nothing of that row is done where that is 0.
    end_row = last_row + tl.where(last_split > 0, 1, 0)

    heads = tl.arange(0, HEAD_BLOCK)
    numbers = tl.arange(0, DIM_BLOCK)
    there = (heads[:, None] < HEADS) & (numbers[None, :] < DIM)
    places = heads[:, None] * DIM + numbers[None, :]
    for row in range(first_row, end_row):
        length = tl.minimum(tl.load(lens + row * TOKENS + TOKENS - 1), num_columns)
        first = tl.where(row == first_row, first_split * SPLIT, 0)
        last = tl.where(row == last_row, tl.minimum(last_split * SPLIT, length), length)
        pages = page_table + tl.cast(row // TABLE_ROWS, tl.int64) * table_pitch
        for token in range(row * TOKENS, row * TOKENS + TOKENS):
            position = tl.cast(token, tl.int64)
            query = tl.load(queries + position * (HEADS * DIM) + places, mask=there, other=0.0)
            weight = tl.load(weights + position * HEADS + heads, mask=heads < HEADS, other=0.0)
            for start in range(first, last, BLOCK_KEYS):
                columns = start + tl.arange(0, BLOCK_KEYS)
                seen = columns < last
                page = tl.load(pages + columns // PAGE_SIZE, mask=seen, other=0).to(tl.int64)
                key = keys + page * PAGE_STRIDE + (columns % PAGE_SIZE) * KEY_STRIDE
                key = tl.load(
                    key[:, None] + numbers[None, :],
                    mask=seen[:, None] & (numbers[None, :] < DIM),
                    other=0.0,
                )
                product = tl.dot(key, tl.trans(query))
                score = tl.sum(tl.maximum(product, 0.0) * weight[None, :], axis=1)
                if QUANTISED:
                    scale = key_scales + page * SCALE_STRIDE + columns % PAGE_SIZE
                    score = score * tl.load(scale, mask=seen, other=0.0)
                tl.store(logits + position * num_columns + columns, score, mask=seen)
