"""The indexer's scores over paged keys, against the bytes that must be read and written."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from benchmarks.cuda.clock import copy_bandwidth
from benchmarks.cuda.rows import Row
from benchmarks.cuda.subjects import by_runner
from mortise.spec.paged_mqa import IndexKeyPages
from mortise.spec.roles import ForwardMode

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.cuda.clock import Clock

NAME = "paged_mqa_logits"
PAGE, DIM, HEADS = 64, 128, 64
CASES = ((1, 32_768), (8, 8192), (64, 8192), (128, 2048), (64, 65_536))
"""Rows, and keys that each of them sees."""


def measure(
    backend: str,
    device: str | None,
    clock: Clock,
    cases: tuple[tuple[int, int], ...] = CASES,
) -> Iterator[Row]:
    """Every case, by every runner that is there.

    Args:
        backend: what is measured.
        device: as of the engine.
        clock: of the device.
        cases: rows and keys.
    """
    bandwidth = copy_bandwidth(clock, 2**30 if clock.device.type == "cuda" else 2**20)
    subjects = dict(by_runner(backend, device, "indexer"))
    for rows, keys in cases:
        inputs = _inputs(rows, keys, clock.device)
        ways, missing = {}, {}
        for name, subject in subjects.items():
            if isinstance(subject, str):
                missing[name] = subject
                continue
            ops = subject.ops
            lens = torch.full((rows, 1), keys, dtype=torch.int32, device=clock.device)
            workers = ops.capabilities.num_workers
            metadata = ops.paged_mqa_metadata(lens, PAGE, workers, ForwardMode.DECODE)
            ways[name] = _call(ops, inputs, metadata)
        times = clock.microseconds(ways)
        # Keys and their scales once, and a float32 for each score.
        nbytes = rows * keys * (DIM + 4 + 4)
        yield Row(
            benchmark=NAME,
            case=f"{rows} rows of {keys:,} keys, {HEADS} heads of {DIM}",
            microseconds=times,
            figures={
                name: {"floor / time": nbytes / bandwidth * 1e6 / taken}
                for name, taken in times.items()
            },
            missing=missing,
        )


def _call(ops: object, inputs: tuple[object, ...], metadata: object) -> object:
    return lambda: ops.paged_mqa_logits(*inputs, metadata)  # type: ignore[attr-defined]


def _inputs(rows: int, keys: int, device: torch.device) -> tuple[object, ...]:
    """Queries, fp8 keys in blocks as the cache lays them out, weights, and a table of pages."""
    pages_of_row = -(-keys // PAGE)
    blocks = torch.empty(rows * pages_of_row, PAGE * (DIM + 4), dtype=torch.uint8, device=device)
    values = torch.randn(rows * pages_of_row, PAGE * DIM, device=device).clamp(-448, 448)
    blocks[:, : PAGE * DIM] = values.to(torch.float8_e4m3fn).view(torch.uint8)
    scales = blocks[:, PAGE * DIM :].view(torch.float32)
    scales.fill_(0.01)
    fused = blocks[:, : PAGE * DIM].view(torch.float8_e4m3fn).unflatten(1, (PAGE, DIM))
    table = torch.randperm(rows * pages_of_row, device=device, dtype=torch.int32)
    query = torch.randn(rows, 1, HEADS, DIM, device=device).bfloat16()
    weights = torch.rand(rows, HEADS, device=device)
    pages = IndexKeyPages(keys=fused, scales=scales)
    return query, pages, weights, table.view(rows, pages_of_row)
