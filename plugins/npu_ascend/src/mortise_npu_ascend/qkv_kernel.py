"""The split of fused projections as one Triton program, for triton-ascend."""

# Triton compiles the source of this function, and looks at every name in it: so there is no other
# annotation than constexpr, and it calls nothing but ``tl``; which is the vendor's Triton, or what
# stands in for it on an emulated chip.

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

# Found in every Triton; the one for this device is triton-ascend, which has the same name.
tl: Any = importlib.import_module("triton.language") if importlib.util.find_spec("triton") else None


def split_kernel(  # type: ignore[no-untyped-def]
    qkvz,
    ba,
    mixed,
    gates,
    betas,
    alphas,
    num_tokens,
    QKVZ_STRIDE: tl.constexpr,
    BA_STRIDE: tl.constexpr,
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
    """Copy every piece of every token to its place.

    Args:
        qkvz: pointer to q, k, v and z of every token; rows may be apart, columns may not.
        ba: pointer to b and a of every token, likewise.
        mixed: pointer to the contiguous result of q, k and v.
        gates: pointer to that of z.
        betas: pointer to that of b.
        alphas: pointer to that of a.
        num_tokens: T.
        QKVZ_STRIDE: numbers from one row of ``qkvz`` to the next.
        BA_STRIDE: numbers from one row of ``ba`` to the next.
        KEY_HEADS: nk.
        RATIO: value heads of one key head.
        KEY_DIM: hk.
        VALUES: numbers of the value heads of one key head.
        INTERLEAVED: the layout.
        BLOCK_TOKENS: rows of a block.
        KEY_BLOCK: columns of a block of keys.
        VALUE_BLOCK: columns of a block of values.
        HEAD_BLOCK: columns of a block of numbers that each value head has one of.
    """
    MIXED_STRIDE = KEY_HEADS * (2 * KEY_DIM + VALUES)
    num_tasks = (num_tokens + BLOCK_TOKENS - 1) // BLOCK_TOKENS * KEY_HEADS
    for task in range(tl.program_id(0), num_tasks, tl.num_programs(0)):
        head = task % KEY_HEADS
        if INTERLEAVED:
            query = head * (2 * KEY_DIM + 2 * VALUES)
            key = query + KEY_DIM
            value = key + KEY_DIM
            gate = value + VALUES
            beta = head * (2 * RATIO)
            alpha = beta + RATIO
        else:
            query = head * KEY_DIM
            key = KEY_HEADS * KEY_DIM + query
            value = 2 * KEY_HEADS * KEY_DIM + head * VALUES
            gate = KEY_HEADS * VALUES + value
            beta = head * RATIO
            alpha = KEY_HEADS * RATIO + beta
        rows = task // KEY_HEADS * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)[:, None]
        there = rows < num_tokens

        columns = tl.arange(0, KEY_BLOCK)[None, :]
        inside = there & (columns < KEY_DIM)
        source = qkvz + rows * QKVZ_STRIDE + columns
        target = mixed + rows * MIXED_STRIDE + head * KEY_DIM + columns
        tl.store(target, tl.load(source + query, mask=inside), mask=inside)
        target += KEY_HEADS * KEY_DIM
        tl.store(target, tl.load(source + key, mask=inside), mask=inside)

        columns = tl.arange(0, VALUE_BLOCK)[None, :]
        inside = there & (columns < VALUES)
        source = qkvz + rows * QKVZ_STRIDE + columns
        target = mixed + rows * MIXED_STRIDE + 2 * KEY_HEADS * KEY_DIM + head * VALUES + columns
        tl.store(target, tl.load(source + value, mask=inside), mask=inside)
        target = gates + rows * (KEY_HEADS * VALUES) + head * VALUES + columns
        tl.store(target, tl.load(source + gate, mask=inside), mask=inside)

        columns = tl.arange(0, HEAD_BLOCK)[None, :]
        inside = there & (columns < RATIO)
        source = ba + rows * BA_STRIDE + columns
        place = rows * (KEY_HEADS * RATIO) + head * RATIO + columns
        tl.store(betas + place, tl.load(source + beta, mask=inside), mask=inside)
        tl.store(alphas + place, tl.load(source + alpha, mask=inside), mask=inside)
