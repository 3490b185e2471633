"""Rows on their way between the ranks of the emulated exchange, over torch.distributed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from collections.abc import Sequence


def exchange(
    group: dist.ProcessGroup, parts: Sequence[torch.Tensor], sent: Sequence[int]
) -> tuple[list[torch.Tensor], list[int]]:
    """Send each rank its rows of several tensors.

    gloo knows no float8, so all of them travel as bytes.

    Args:
        group: the ranks.
        parts: tensors ``[S, ...]`` of S rows, by destination.
        sent: rows to each rank.

    Returns:
        The same tensors of the rows that came, by source; and how many came from each rank.
    """
    counts = torch.empty(group.size(), dtype=torch.int64)
    dist.all_to_all_single(counts, torch.tensor(sent, dtype=torch.int64), group=group)
    received: list[int] = counts.tolist()
    columns = [_bytes(part) for part in parts]
    packets = torch.cat(columns, dim=1)
    came = packets.new_empty(sum(received), packets.shape[1])
    dist.all_to_all_single(came, packets, received, list(sent), group=group)
    widths = [column.shape[1] for column in columns]
    arrived = [
        bytes_of_part.clone(memory_format=torch.contiguous_format)
        .view(part.dtype)
        .view(len(came), *part.shape[1:])
        for bytes_of_part, part in zip(came.split(widths, dim=1), parts, strict=True)
    ]
    return arrived, received


def gather(group: dist.ProcessGroup, numbers: torch.Tensor) -> torch.Tensor:
    """The int64 numbers ``[N]`` of every rank, ``[G, N]``."""
    own = numbers.to(torch.int64).expand(group.size(), -1).contiguous()
    every = torch.empty_like(own)
    dist.all_to_all_single(every, own, group=group)
    return every


def unwritten(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """A tensor as the device allocates it: NaN in every float format, -1 as an integer."""
    tensor = torch.empty(tuple(shape), dtype=dtype)
    tensor.view(torch.uint8).fill_(0xFF)
    return tensor


def _bytes(part: torch.Tensor) -> torch.Tensor:
    """The rows ``[S, bytes]`` of a tensor ``[S, ...]``."""
    return part.contiguous().view(len(part), part.shape[1:].numel()).view(torch.uint8)
