"""The indexer's schedule and scores over paged keys, in plain torch."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from mortise.spec.paged_mqa import (
    SPLIT_TOKENS,
    IndexKeyPages,
    PagedMQABuffers,
    PagedMQAMetadata,
)

if TYPE_CHECKING:
    from mortise.spec.roles import ForwardMode


def paged_mqa_metadata(
    context_lens: torch.Tensor, block_size: int, num_workers: int, mode: ForwardMode
) -> PagedMQAMetadata:
    """Own a copy of the lengths, and in the modes that need one the schedule made from them."""
    rows, next_n = context_lens.shape
    schedule = plan_schedule(context_lens, num_workers) if mode.needs_schedule else None
    return PagedMQAMetadata(
        mode=mode,
        rows=rows,
        next_n=next_n,
        block_size=block_size,
        num_workers=num_workers,
        max_context_len=int(context_lens.max()) if rows else 0,
        buffers=PagedMQABuffers(context_lens.clone(), schedule),
    )


def plan_schedule(context_lens: torch.Tensor, num_workers: int) -> torch.Tensor:
    """Share units of 256 tokens among workers as evenly as possible, the remainder to the last.

    Args:
        context_lens: int32 ``[rows, next_n]``; every query token is an atom of its own.
        num_workers: at least 1.

    Returns:
        int32 ``[num_workers + 1, 2]``: worker s does the units from entry s up to entry s + 1;
        an entry is (atom, unit within the atom), the last is (number of atoms, 0). Two equal
        entries are a worker without work.
    """
    units = (context_lens.flatten().clamp(min=1).long() + SPLIT_TOKENS - 1) // SPLIT_TOKENS
    ends = units.cumsum(0)
    num_atoms, total = units.numel(), int(units.sum())
    share, rest = divmod(total, num_workers)
    workers = torch.arange(num_workers, device=context_lens.device)
    starts = workers * share + (workers - (num_workers - rest)).clamp(min=0)
    atoms = torch.searchsorted(ends, starts, right=True)
    before = torch.cat([ends.new_zeros(1), ends])[atoms]
    entries = torch.stack([atoms, starts - before], dim=1)
    return torch.cat([entries, entries.new_tensor([[num_atoms, 0]])]).to(torch.int32)


def paged_mqa_logits(
    query: torch.Tensor,
    key_pages: IndexKeyPages,
    weights: torch.Tensor,
    page_table: torch.Tensor,
    metadata: PagedMQAMetadata,
) -> torch.Tensor:
    """Score in float32; consecutive rows of one request read its keys once."""
    metadata.check_launch(query.shape[0], page_table.shape[0], weights.shape[0])
    num_pages = -(-metadata.max_context_len // metadata.block_size)
    assert page_table.shape[1] >= num_pages, "a row's pages do not reach its length"
    table = page_table[:, :num_pages]
    rows, next_n, heads, dim = query.shape
    if rows == 0:
        return weights.new_empty(0, num_pages * metadata.block_size)
    # Contiguous: only then does one matrix product serve all rows of shared keys.
    query_RSD = query.reshape(rows, next_n * heads, dim).float().contiguous()
    weights_RSN = weights.view(rows, next_n, heads)
    runs = _runs(table)
    if len(runs) == rows:
        return _score(query_RSD, _gather(key_pages, table), weights_RSN).flatten(0, 1)
    scores = []
    for start, end in runs:
        keys_CD = _gather(key_pages, table[start])
        scores.append(_score(query_RSD[start:end], keys_CD, weights_RSN[start:end]))
    return torch.cat(scores).flatten(0, 1)


def _runs(table_RP: torch.Tensor) -> list[tuple[int, int]]:
    rows = table_RP.shape[0]
    changed = (table_RP[1:] != table_RP[:-1]).any(dim=1).tolist() if rows > 1 else []
    bounds = [0, *(row for row in range(1, rows) if changed[row - 1]), rows]
    return list(pairwise(bounds))


def _gather(key_pages: IndexKeyPages, table: torch.Tensor) -> torch.Tensor:
    """Keys float32 ``[..., C, D]`` of pages ``[..., P]``."""
    # Selecting whole pages copies them; indexing with two dimensions goes element by element.
    pages = table.flatten()
    keys = _selected(key_pages.keys, pages).float()
    if key_pages.scales is not None:
        keys = keys * key_pages.scales.index_select(0, pages).unsqueeze(-1)
    num_keys = table.shape[-1] * keys.shape[1]
    return keys.view(*table.shape[:-1], num_keys, keys.shape[-1])


def _selected(pages_PSD: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    if pages_PSD.dtype is not torch.float8_e4m3fn:
        return pages_PSD.index_select(0, places)
    # As bytes: not every operator of torch takes float8.
    return pages_PSD.view(torch.uint8).index_select(0, places).view(torch.float8_e4m3fn)


def _score(query_RSD: torch.Tensor, keys: torch.Tensor, weights_RSN: torch.Tensor) -> torch.Tensor:
    """Scores ``[R, next_n, C]`` of rows against keys ``[C, D]`` or ``[R, C, D]``."""
    rows, next_n, heads = weights_RSN.shape
    products = torch.matmul(query_RSD, keys.transpose(-1, -2)).relu_()
    products = products.view(rows * next_n, heads, -1)
    scores = torch.bmm(weights_RSN.reshape(rows * next_n, 1, heads), products)
    return scores.view(rows, next_n, -1)
