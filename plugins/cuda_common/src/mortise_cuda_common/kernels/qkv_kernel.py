"""The split of fused projections as one Triton program."""

# Triton compiles the source of this function, and looks at every name in it: so there is no other
# annotation than constexpr, and it calls nothing but ``tl``.

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

tl: Any = importlib.import_module("triton.language") if importlib.util.find_spec("triton") else None


def split_kernel(  # type: ignore[no-untyped-def]
    qkvz,
    ba,
    mixed,
    gates,
    betas,
    alphas,
    num_tokens,
    qkvz_stride,
    ba_stride,
    KEY_HEADS: tl.constexpr,
    RATIO: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUES: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
) -> None:
    """Copy what one key head has of a block of tokens; the first head copies b and a of all.

    Args:
        qkvz: pointer to q, k, v and z of every token; rows may be apart, columns may not.
        ba: pointer to b and a of every token, likewise.
        mixed: pointer to the contiguous result of q, k and v.
        gates: pointer to that of z.
        betas: pointer to that of b.
        alphas: pointer to that of a.
        num_tokens: T.
        qkvz_stride: numbers from one row of ``qkvz`` to the next.
        ba_stride: numbers from one row of ``ba`` to the next.
        KEY_HEADS: nk.
        RATIO: value heads of one key head.
        KEY_DIM: hk.
        VALUES: numbers of the value heads of one key head.
        INTERLEAVED: the layout.
        BLOCK_TOKENS: rows of a block.
        KEY_BLOCK: no fewer columns than hk.
        VALUE_BLOCK: columns of a block of values.
        HEAD_BLOCK: no fewer columns than there are value heads.
    """
    head = tl.program_id(0) % KEY_HEADS
    tokens = tl.program_id(0) // KEY_HEADS * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)[:, None]
    there = tokens < num_tokens
    # One row of Qwen3-Next has 12,288 numbers: of 174,763 tokens 32 bits count no longer all.
    rows = tokens.to(tl.int64)
    if INTERLEAVED:
        query = head * (2 * KEY_DIM + 2 * VALUES)
        key = query + KEY_DIM
        value = key + KEY_DIM
        gate = value + VALUES
    else:
        query = head * KEY_DIM
        key = KEY_HEADS * KEY_DIM + query
        value = 2 * KEY_HEADS * KEY_DIM + head * VALUES
        gate = KEY_HEADS * VALUES + value
    source = qkvz + rows * qkvz_stride
    mixed_row = mixed + rows * (KEY_HEADS * (2 * KEY_DIM + VALUES))
    gate_row = gates + rows * (KEY_HEADS * VALUES)

    # Everything is read before anything is written, for what is written could be what is read.
    key_columns = tl.arange(0, KEY_BLOCK)[None, :]
    inside_keys = there & (key_columns < KEY_DIM)
    queries = tl.load(source + query + key_columns, mask=inside_keys)
    keys = tl.load(source + key + key_columns, mask=inside_keys)
    for first in tl.static_range(0, VALUES, VALUE_BLOCK):
        columns = first + tl.arange(0, VALUE_BLOCK)[None, :]
        inside = there & (columns < VALUES)
        values = tl.load(source + value + columns, mask=inside)
        opened = tl.load(source + gate + columns, mask=inside)
        target = mixed_row + 2 * KEY_HEADS * KEY_DIM + head * VALUES + columns
        tl.store(target, values, mask=inside)
        tl.store(gate_row + head * VALUES + columns, opened, mask=inside)
    key_target = mixed_row + head * KEY_DIM + key_columns
    tl.store(key_target, queries, mask=inside_keys)
    tl.store(key_target + KEY_HEADS * KEY_DIM, keys, mask=inside_keys)

    # Within a branch a name cannot become a block of another shape.
    if head == 0:
        value_heads = tl.arange(0, HEAD_BLOCK)[None, :]
        inside_heads = there & (value_heads < KEY_HEADS * RATIO)
        if INTERLEAVED:
            beta = value_heads // RATIO * (2 * RATIO) + value_heads % RATIO
            alpha = beta + RATIO
        else:
            beta = value_heads
            alpha = value_heads + KEY_HEADS * RATIO
        ba_row = ba + rows * ba_stride
        place = rows * (KEY_HEADS * RATIO) + value_heads
        tl.store(betas + place, tl.load(ba_row + beta, mask=inside_heads), mask=inside_heads)
        tl.store(alphas + place, tl.load(ba_row + alpha, mask=inside_heads), mask=inside_heads)
