"""The split of fused projections beside the unfused chain; the aim is 0.85 of a copy's speed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from benchmarks.cuda.clock import copy_bandwidth
from benchmarks.cuda.rows import Row
from benchmarks.cuda.subjects import bound
from mortise.reference import qkv as reference
from mortise.spec.qkv import QKVLayout, QKVShape

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.cuda.clock import Clock

NAME = "qkv_split"
SHAPES = {
    "Qwen3-Next 16/32 heads": (16, 32, 128, 128),
    "one of 4 ranks, 4/8 heads": (4, 8, 128, 128),
    "ratio 3, 8/24 heads": (8, 24, 128, 128),
}
TOKENS = (1, 128, 8192, 70_000)


def measure(
    backend: str, device: str | None, clock: Clock, tokens: tuple[int, ...] = TOKENS
) -> Iterator[Row]:
    """Every shape, layout and number of tokens.

    Args:
        backend: what is measured.
        device: as of the engine.
        clock: of the device.
        tokens: numbers of tokens.
    """
    ops = bound(backend, device).ops
    bandwidth = copy_bandwidth(clock, 2**30 if clock.device.type == "cuda" else 2**20)
    for name, (key_heads, value_heads, key_dim, value_dim) in SHAPES.items():
        for layout in QKVLayout:
            shape = QKVShape(
                num_key_heads=key_heads,
                num_value_heads=value_heads,
                key_head_dim=key_dim,
                value_head_dim=value_dim,
                layout=layout,
            )
            for count in tokens:
                yield _row(f"{name}, {layout.value}, {count:,} tokens", ops, shape, count, clock,
                           bandwidth)  # fmt: skip


def _row(
    case: str, ops: object, shape: QKVShape, tokens: int, clock: Clock, bandwidth: float
) -> Row:
    keys, values = (
        shape.num_key_heads * shape.key_head_dim,
        shape.num_value_heads * shape.value_head_dim,
    )
    qkvz = torch.randn(tokens, 2 * keys + 2 * values, device=clock.device).bfloat16()
    ba = torch.randn(tokens, 2 * shape.num_value_heads, device=clock.device).bfloat16()
    times = clock.microseconds(
        {
            "fused": lambda: ops.qkv_split(qkvz, ba, shape),  # type: ignore[attr-defined]
            "unfused chain": lambda: reference.qkv_split(qkvz, ba, shape),
        }
    )
    moved = 2 * (qkvz.nbytes + ba.nbytes)
    return Row(
        benchmark=NAME,
        case=case,
        microseconds=times,
        figures={
            way: {
                "of copy bandwidth": moved / (taken * 1e-6) / bandwidth,
                "unfused / this": times["unfused chain"] / taken,
            }
            for way, taken in times.items()
        },
    )
