"""Launches of the indexer: lengths at the edges of pages and of units of work, paged keys."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import torch

from mortise.conformance.draws import draw_rows
from mortise.conformance.tolerances import Tolerance, of_scores
from mortise.formats.index_keys import quantise_index_keys
from mortise.plugin import ForwardMode, IndexKeyDtype, IndexKeyPages

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mortise.backends import Ops
    from mortise.plugin import Capabilities, PagedMQAMetadata

HEADS: Final = 8
DIM: Final = 32
MOST_NEXT_N: Final = 4
"""A backend may take any number of tokens a row; more than these ask nothing new."""

REQUESTS: Final = ((1,), (63,), (64,), (65,), (0,), (255, 256, 257), (600,), (129, 130))
"""Lengths of the rows of each request; rows of one request read the same pages."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexCase:
    """One kind of launch.

    Args:
        keys: how keys are cached.
        dtype: compute dtype.
        next_n: tokens of a row.
        block_size: tokens of a page.
    """

    keys: IndexKeyDtype
    dtype: torch.dtype
    next_n: int
    block_size: int

    def __str__(self) -> str:
        said = f"{self.keys.value}_keys-{str(self.dtype)[6:]}-{self.next_n}_a_row"
        return f"{said}-pages_of_{self.block_size}"

    @property
    def subject(self) -> str:
        """Hook and how keys are cached."""
        return f"paged_mqa_logits of {self.keys.value} keys"

    @property
    def tolerance(self) -> Tolerance:
        """How far scores may be off."""
        return of_scores(self.keys, self.dtype, HEADS, DIM)


def launches(capabilities: Capabilities) -> Iterator[IndexCase]:
    """Each claimed way to cache keys, compute dtype, number of tokens a row and page size."""
    for keys in capabilities.index_key_dtypes:
        for dtype in capabilities.compute_dtypes:
            for next_n in range(1, min(capabilities.max_native_next_n, MOST_NEXT_N) + 1):
                for block_size in sorted(capabilities.page_sizes):
                    yield IndexCase(keys=keys, dtype=dtype, next_n=next_n, block_size=block_size)


def plain_launches(capabilities: Capabilities) -> Iterator[IndexCase]:
    """The best compute dtype of each way to cache keys, one token a row."""
    for case in launches(capabilities):
        if case.next_n == 1 and case.dtype is capabilities.compute_dtypes[0]:
            yield case


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """The arguments of one launch: R rows of n tokens, N heads of D numbers.

    Args:
        query: ``[R, n, N, D]``.
        pages: cached keys, not a number wherever nothing was written.
        weights: float32 ``[R * n, N]``.
        table: int32 ``[R, pages]``.
        lens: int32 ``[R, n]``.
    """

    query: torch.Tensor
    pages: IndexKeyPages
    weights: torch.Tensor
    table: torch.Tensor
    lens: torch.Tensor

    def on(self, device: torch.device) -> Launch:
        """The same there; pages with scales stay one block each."""
        return Launch(
            query=self.query.to(device),
            pages=_pages_on(self.pages, device),
            weights=self.weights.to(device),
            table=self.table.to(device),
            lens=self.lens.to(device),
        )

    def planned(
        self, ops: Ops, block_size: int, mode: ForwardMode, num_workers: int
    ) -> PagedMQAMetadata:
        """The plan of a backend."""
        return ops.paged_mqa_metadata(self.lens, block_size, num_workers, mode)

    def scored(self, ops: Ops, metadata: PagedMQAMetadata) -> torch.Tensor:
        """The scores of a backend."""
        return ops.paged_mqa_logits(self.query, self.pages, self.weights, self.table, metadata)


def draw_launch(
    case: IndexCase, requests: Sequence[Sequence[int]] = REQUESTS, seed: int = 0
) -> Launch:
    """A launch whose pages lie in any order."""
    lens = torch.tensor(
        [_lens_of_row(length, case.next_n) for rows in requests for length in rows],
        dtype=torch.int32,
    ).view(-1, case.next_n)
    table, num_pages = _draw_table(requests, case.block_size, seed)
    written = torch.zeros(num_pages, case.block_size, dtype=torch.bool)
    for row, length in zip(table, lens.amax(dim=1).tolist(), strict=True):
        _mark(written, row, length, case.block_size)
    rows = len(lens)
    query = draw_rows(rows * case.next_n * HEADS, DIM, case.dtype, seed=seed + 1)
    return Launch(
        query=query.view(rows, case.next_n, HEADS, DIM),
        pages=_draw_pages(case, written, seed + 2),
        weights=draw_rows(rows * case.next_n, HEADS, torch.float32, seed=seed + 3),
        table=table,
        lens=lens,
    )


def _lens_of_row(length: int, next_n: int) -> list[int]:
    """The tokens of a row follow each other; a row of no keys has none in any of them."""
    return [max(length - (next_n - 1) + token, min(length, 1)) for token in range(next_n)]


def _draw_table(
    requests: Sequence[Sequence[int]], block_size: int, seed: int
) -> tuple[torch.Tensor, int]:
    width = max((-(-max(rows) // block_size) for rows in requests), default=0)
    counts = [-(-max(rows) // block_size) for rows in requests]
    order = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(seed)) + 1
    table, start = [], 0
    for rows, count in zip(requests, counts, strict=True):
        # Places behind the last page name page 0, which nobody wrote.
        own = [*order[start : start + count].tolist(), *([0] * (width - count))]
        table += [own] * len(rows)
        start += count
    return torch.tensor(table, dtype=torch.int32).view(len(table), width), sum(counts) + 1


def _mark(written: torch.Tensor, pages: torch.Tensor, length: int, block_size: int) -> None:
    for place in range(0, length, block_size):
        page = int(pages[place // block_size])
        written[page, : min(block_size, length - place)] = True


def _draw_pages(case: IndexCase, written: torch.Tensor, seed: int) -> IndexKeyPages:
    num_pages, block_size = written.shape
    keys = draw_rows(num_pages * block_size, DIM, torch.float32, seed=seed)
    keys = keys.view(num_pages, block_size, DIM)
    # Keys of different sizes, so that a scale that is missing shows.
    keys = keys * (0.5 + torch.arange(block_size) % 4).unsqueeze(1)
    if case.keys is IndexKeyDtype.COMPUTE:
        return IndexKeyPages(keys=keys.masked_fill(~written.unsqueeze(2), torch.nan).to(case.dtype))
    values, scales = quantise_index_keys(keys)
    values_bytes = values.contiguous().view(torch.uint8).masked_fill(~written.unsqueeze(2), 0xFF)
    scales = scales.masked_fill(~written, torch.nan)
    scale_bytes = scales.contiguous().view(torch.uint8).view(num_pages, -1)
    return _views(torch.cat([values_bytes.flatten(1), scale_bytes], dim=1), block_size)


def _views(fused: torch.Tensor, block_size: int) -> IndexKeyPages:
    """Keys and scales in one block a page: all keys, then all scales."""
    keys = fused[:, : block_size * DIM].view(torch.float8_e4m3fn)
    scales = fused[:, block_size * DIM :].view(torch.float32)
    return IndexKeyPages(keys=keys.unflatten(1, (block_size, DIM)), scales=scales)


def _pages_on(pages: IndexKeyPages, device: torch.device) -> IndexKeyPages:
    if pages.scales is None:
        return IndexKeyPages(keys=pages.keys.to(device))
    num_pages, block_size = pages.scales.shape
    parts = [
        pages.keys.contiguous().view(torch.uint8).view(num_pages, -1),
        pages.scales.contiguous().view(torch.uint8).view(num_pages, -1),
    ]
    return _views(torch.cat(parts, dim=1).to(device), block_size)


def visible(scores: torch.Tensor, lens: torch.Tensor) -> torch.Tensor:
    """Scores ``[R * n, longest length]`` with zero at and past each row's length."""
    lens = lens.cpu()
    columns = torch.arange(int(lens.max()))
    return scores.cpu()[:, : len(columns)].masked_fill(columns >= lens.flatten().unsqueeze(1), 0.0)


def without_scales(launch: Launch) -> Launch:
    """As if scales of keys were one."""
    assert launch.pages.scales is not None
    ones = torch.ones_like(launch.pages.scales)
    return replace(launch, pages=replace(launch.pages, scales=ones))
