"""The lightning indexer's schedule and scores over paged keys."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Final

import torch

from mortise.plugin import PagedMQABuffers, PagedMQAMetadata

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mortise.plugin import ForwardMode, IndexKeyPages

MOST_NUMBERS: Final = 2**26
"""Products of queries and keys, or keys, that are in memory at a time: 256 MiB of float32."""


def paged_mqa_metadata(
    context_lens: torch.Tensor, block_size: int, num_workers: int, mode: ForwardMode
) -> PagedMQAMetadata:
    """Own a copy of the lengths; matrix products of this device plan by themselves.

    A negative length, which an operator of the device would read as a huge one, counts as zero.
    """
    rows, next_n = context_lens.shape
    owned = context_lens.clamp(min=0).contiguous()
    return PagedMQAMetadata(
        mode=mode,
        rows=rows,
        next_n=next_n,
        block_size=block_size,
        num_workers=num_workers,
        max_context_len=int(owned.max()) if owned.numel() else 0,
        buffers=PagedMQABuffers(owned, schedule=None),
    )


def paged_mqa_logits(
    query: torch.Tensor,
    key_pages: IndexKeyPages,
    weights: torch.Tensor,
    page_table: torch.Tensor,
    metadata: PagedMQAMetadata,
) -> torch.Tensor:
    """Score keys as ``npu_lightning_indexer`` does before it sorts.

    Which is ``sum_h w[h] * relu(q[h] . k)``: the 16-bit numbers multiplied and summed in float32,
    float32 weights, no division by the square root of D. The operator itself returns the indices of
    the best and no scores, so it cannot answer here. Its scores are rounded to bfloat16 where it
    gives them away; these are not, so that they have no ties that its own would not have.
    """
    metadata.check_launch(query.shape[0], page_table.shape[0], weights.shape[0])
    num_pages = -(-metadata.max_context_len // metadata.block_size)
    assert page_table.shape[1] >= num_pages, "a row's pages do not reach its length"
    rows, next_n, heads, dim = query.shape
    scores = weights.new_empty(rows, next_n, num_pages * metadata.block_size)
    if not scores.numel():
        return scores.flatten(0, 1)
    table_RP = page_table[:, :num_pages]
    query_RSD = query.reshape(rows, next_n * heads, dim).float()
    weights_RNS = weights.float().view(rows, next_n, heads)
    numbers_of_a_row = max(query_RSD.shape[1], dim) * scores.shape[2]
    runs = _runs_of_equal_rows(table_RP)
    if len(runs) == rows:
        for part in _parts(0, rows, numbers_of_a_row):
            keys_RCD = _keys(key_pages, table_RP[part])
            scores[part] = _score(query_RSD[part], keys_RCD, weights_RNS[part])
        return scores.flatten(0, 1)
    for start, end in runs:
        keys_CD = _keys(key_pages, table_RP[start])
        for part in _parts(start, end, numbers_of_a_row):
            scores[part] = _score(query_RSD[part], keys_CD, weights_RNS[part])
    return scores.flatten(0, 1)


def _score(query_RSD: torch.Tensor, keys: torch.Tensor, weights_RNS: torch.Tensor) -> torch.Tensor:
    """Scores ``[R, next_n, C]`` of rows against keys ``[C, D]`` or ``[R, C, D]``."""
    rows, next_n, heads = weights_RNS.shape
    products = torch.matmul(query_RSD, keys.transpose(-1, -2)).relu_()
    products = products.view(rows * next_n, heads, -1)
    scores = torch.bmm(weights_RNS.reshape(rows * next_n, 1, heads), products)
    return scores.view(rows, next_n, -1)


def _runs_of_equal_rows(table_RP: torch.Tensor) -> list[tuple[int, int]]:
    """Consecutive rows of one request, which share its keys."""
    changed = (table_RP[1:] != table_RP[:-1]).any(dim=1).tolist()
    bounds = [0, *(row + 1 for row, is_new in enumerate(changed) if is_new), table_RP.shape[0]]
    return list(pairwise(bounds))


def _keys(key_pages: IndexKeyPages, table: torch.Tensor) -> torch.Tensor:
    """Keys float32 ``[..., C, D]`` of pages ``[..., P]``."""
    pages = table.flatten()
    keys_PBD = key_pages.keys.index_select(0, pages).float()
    if key_pages.scales is not None:
        keys_PBD = keys_PBD * key_pages.scales.index_select(0, pages).unsqueeze(-1)
    return keys_PBD.view(*table.shape[:-1], -1, keys_PBD.shape[-1])


def _parts(start: int, end: int, numbers_of_a_row: int) -> Iterator[slice]:
    """Rows ``start`` to ``end``, as many at a time as memory is set aside for."""
    step = max(1, MOST_NUMBERS // numbers_of_a_row)
    for first in range(start, end, step):
        yield slice(first, min(first + step, end))
