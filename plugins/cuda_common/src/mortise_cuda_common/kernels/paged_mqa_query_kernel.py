"""The quantisation of index queries, their scales folded into weights, as one Triton program."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

tl: Any = importlib.import_module("triton.language") if importlib.util.find_spec("triton") else None


def paged_mqa_query_kernel(  # type: ignore[no-untyped-def]
    queries,
    weights,
    values,
    folded,
    QUERY_STRIDE: tl.constexpr,
    HEAD_STRIDE: tl.constexpr,
    WEIGHT_STRIDE: tl.constexpr,
    SMALLEST_AMAX: tl.constexpr,
    HEADS: tl.constexpr,
    PADDED_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
) -> None:
    """Quantise all heads of one query to e4m3, and add heads of zeros.

    A scale is max(amax, SMALLEST_AMAX) / 448, a value x * (1 / scale), and a weight is multiplied
    by the scale of its head, which is positive and so may leave the relu.

    Args:
        queries: pointer to bfloat16 or float32 ``[T, HEADS, DIM]``.
        weights: pointer to float32 ``[T, HEADS]``.
        values: pointer to contiguous e4m3 ``[T, PADDED_HEADS, DIM]``.
        folded: pointer to contiguous float32 ``[T, PADDED_HEADS]``.
        QUERY_STRIDE: numbers from one query to the next.
        HEAD_STRIDE: numbers from one head to the next.
        WEIGHT_STRIDE: numbers from one row of weights to the next.
        SMALLEST_AMAX: amax of heads of zeros, or nearly so.
        HEADS: of a query.
        PADDED_HEADS: of a result.
        DIM: of a head.
        HEAD_BLOCK: heads of a block, no fewer than PADDED_HEADS.
        DIM_BLOCK: numbers of a block's head.
    """
    token = tl.program_id(0).to(tl.int64)
    heads = tl.arange(0, HEAD_BLOCK)
    numbers = tl.arange(0, DIM_BLOCK)
    inside = numbers[None, :] < DIM
    there = (heads[:, None] < HEADS) & inside
    source = queries + token * QUERY_STRIDE + heads[:, None] * HEAD_STRIDE + numbers[None, :]
    query = tl.load(source, mask=there, other=0.0).to(tl.float32)
    scale = tl.div_rn(tl.maximum(tl.max(tl.abs(query), axis=1), SMALLEST_AMAX), 448.0)
    scaled = query * tl.div_rn(1.0, scale)[:, None]
    scaled = tl.minimum(tl.maximum(scaled, -448.0), 448.0)
    target = values + token * (PADDED_HEADS * DIM) + heads[:, None] * DIM + numbers[None, :]
    padded = heads < PADDED_HEADS
    tl.store(target, scaled.to(tl.float8e4nv), mask=padded[:, None] & inside)
    weight = tl.load(weights + token * WEIGHT_STRIDE + heads, mask=heads < HEADS, other=0.0)
    tl.store(folded + token * PADDED_HEADS + heads, weight * scale, mask=padded)
