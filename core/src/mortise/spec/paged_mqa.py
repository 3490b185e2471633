"""The schedule of the indexer over paged keys, with the lengths it was made from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING

from mortise.errors import ContractError, StaleScheduleError
from mortise.spec.reasons import ReasonCode

if TYPE_CHECKING:
    import torch

    from mortise.spec.roles import ForwardMode

SPLIT_TOKENS = 256
"""Tokens in one unit of scheduled work (DeepGEMM's SPLIT_KV: four blocks of 64)."""


class PagedMQABuffers:
    """The tensors that a kernel reads, in storage that never moves.

    A captured graph holds their addresses: a refresh copies into them, one generation further.

    Args:
        context_lens: int32 ``[rows, next_n]``, contiguous, the true visible length of each row.
        schedule: int32 ``[num_workers + 1, 2]`` or whatever the backend's kernel takes; None where
            the backend's kernel plans by itself.
        planned_lens: int32 ``[rows, next_n]``, the lengths as planner and kernel both read them,
            at least 1 each; it may be a view of a larger buffer. None where the kernel reads the
            true ones.
    """

    __slots__ = ("context_lens", "generation", "planned_lens", "schedule")

    def __init__(
        self,
        context_lens: torch.Tensor,
        schedule: torch.Tensor | None,
        planned_lens: torch.Tensor | None = None,
    ) -> None:
        self.context_lens = context_lens
        self.schedule = schedule
        self.planned_lens = planned_lens
        self.generation = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PagedMQAMetadata:
    """What a schedule is for (immutable), beside the buffers it lives in (refreshed in place).

    Args:
        mode: the kind of forward pass.
        rows: rows of the query.
        next_n: query tokens of each row.
        block_size: tokens per page.
        num_workers: workers that share the work.
        max_context_len: the longest visible length, on the host.
        buffers: the tensors.
        generation: refreshes of the buffers so far, when this description was made.
    """

    mode: ForwardMode
    rows: int
    next_n: int
    block_size: int
    num_workers: int
    max_context_len: int
    buffers: PagedMQABuffers
    generation: int = 0

    @property
    def context_lens(self) -> torch.Tensor:
        """int32 ``[rows, next_n]``: the lengths this schedule was made from, and no others."""
        return self.buffers.context_lens

    @property
    def schedule(self) -> torch.Tensor | None:
        """The backend's own schedule tensor."""
        return self.buffers.schedule

    @property
    def planned_lens(self) -> torch.Tensor | None:
        """int32 ``[rows, next_n]``: the lengths, at least 1, that the schedule divides up."""
        return self.buffers.planned_lens

    def check_launch(self, query_rows: int, page_table_rows: int, weight_rows: int) -> None:
        """Assert before a launch that everything agrees in number and belongs to this generation.

        Raises:
            StaleScheduleError: the buffers were refreshed since this description was made.
            ContractError: rows of query, weights, page table and lengths differ.
        """
        if self.generation != self.buffers.generation:
            raise StaleScheduleError(
                f"schedule of generation {self.generation} launched on buffers of generation "
                f"{self.buffers.generation}",
                reason=ReasonCode.CONTRACT_BROKEN,
                remedy="use the metadata that the last refresh returned",
            )
        if not (
            query_rows == page_table_rows == self.rows and weight_rows == self.rows * self.next_n
        ):
            raise ContractError(
                f"indexer launch with {query_rows} query rows, {page_table_rows} page-table rows, "
                f"{weight_rows} weight rows for lengths of {self.rows} x {self.next_n}",
                reason=ReasonCode.CONTRACT_BROKEN,
                expected="the same number of rows everywhere",
            )


def refresh_paged_mqa_metadata(
    stale: PagedMQAMetadata, fresh: PagedMQAMetadata, *, captured_context_len: int | None = None
) -> PagedMQAMetadata:
    """Copy a new plan into the storage of an old one; the one function for every replay path.

    Args:
        stale: metadata whose buffers a captured graph reads.
        fresh: metadata just made by ``paged_mqa_metadata`` for the same rows and mode.
        captured_context_len: ``max_context_len`` of the metadata that a graph was captured with:
            its launch writes so many columns at every replay. None where nothing was captured.

    Returns:
        The description of the new generation, over the old storage.

    Raises:
        ContractError: the two are not for the same shape and mode, one lacks a tensor that the
            other has, or a row is longer than what was captured.
    """
    if captured_context_len is not None and fresh.max_context_len > captured_context_len:
        raise ContractError(
            f"cannot replay what was captured for {captured_context_len} keys of a row with "
            f"{fresh.max_context_len}",
            reason=ReasonCode.CONTRACT_BROKEN,
            expected="a capture with the longest context that it will be replayed with",
            remedy="capture again, or run this step without the graph",
        )
    same_shape = (stale.mode, stale.rows, stale.next_n, stale.block_size, stale.num_workers) == (
        fresh.mode,
        fresh.rows,
        fresh.next_n,
        fresh.block_size,
        fresh.num_workers,
    )
    pairs = ((stale.schedule, fresh.schedule), (stale.planned_lens, fresh.planned_lens))
    if not same_shape or any((old is None) != (new is None) for old, new in pairs):
        raise ContractError(
            f"cannot refresh a {stale.mode} schedule of {stale.rows} x {stale.next_n} rows with a "
            f"{fresh.mode} schedule of {fresh.rows} x {fresh.next_n} rows",
            reason=ReasonCode.CONTRACT_BROKEN,
            expected="the mode, rows, block size and workers the buffers were made for",
        )
    buffers = stale.buffers
    buffers.context_lens.copy_(fresh.context_lens)
    for old, new in pairs:
        if old is not None and new is not None:
            old.copy_(new)
    buffers.generation += 1
    return replace(fresh, buffers=buffers, generation=buffers.generation)


class IndexKeyDtype(StrEnum):
    """How the indexer's keys are cached."""

    COMPUTE = "compute"
    """In the dtype of the hidden state, without scales."""
    FP8_E4M3 = "fp8"
    """float8 e4m3 with one float32 scale a key."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexKeyPages:
    """The indexer's cached keys of one layer, D wide, as views of one block a page.

    COMPUTE: ``keys`` ``[P, 64, D]`` of the compute dtype, contiguous, and no scales.

    FP8_E4M3: ``keys`` float8_e4m3fn ``[P, 64, D]`` and ``scales`` float32 ``[P, 64]`` in one
    uint8 block ``[64 * (D + 4)]`` a page: first the 64 * D bytes of its keys, then its 64 scales
    (the layout of DeepGEMM's fused key cache). Pages are therefore ``64 * (D + 4)`` bytes apart in
    both, and the scales of page p begin ``64 * D`` bytes behind its keys.

    Args:
        keys: the cached keys.
        scales: one for each key, where they are quantised.
    """

    keys: torch.Tensor
    scales: torch.Tensor | None = None
