"""The indexer's schedule and scores over paged keys, planned and launched by one owner."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

import torch

from mortise.plugin import (
    ConfigError,
    ContractError,
    PagedMQABuffers,
    PagedMQAMetadata,
    ReasonCode,
)
from mortise.reference import attention as reference
from mortise_cuda_common.index_launch import Launch, check_lens, fused_kv
from mortise_cuda_common.kernels import paged_mqa
from mortise_cuda_common.schedule import sm90_schedule

if TYPE_CHECKING:
    from mortise.plugin import ForwardMode, IndexKeyPages
    from mortise_cuda_common.libraries.deep_gemm import DeepGEMM
    from mortise_cuda_common.programs.base import Programs
    from mortise_cuda_common.runtime import Runtime

MOST_PLANNED_ROWS: Final = 2**14
"""Rows of lengths that DeepGEMM's planner holds in shared memory: 8 bytes each on SM100, 4 on SM90,
of 227 KiB."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How a schedule numbers its work.

    Args:
        by_deep_gemm: DeepGEMM makes it and can be launched with it.
        tokens: queries of one row of lengths.
        entry_tokens: what the first number of an entry is divided by for its row of lengths.
    """

    by_deep_gemm: bool
    tokens: int = 1
    entry_tokens: int = 1


class Indexer:
    """Plans and scores, by DeepGEMM or by a Triton program, with the same lengths in both.

    Passes of every mode take the same way, so that a row's scores do not depend on whether its
    token was part of a prompt, decoded, or verified. Keys that are not float8 are the program's.

    Args:
        runtime: the chip and what computes on it.
        choice: ``auto`` scores float8 keys by DeepGEMM where it is there and takes their shape;
            ``deep_gemm`` makes it an error where it does not; ``triton`` leaves it aside.
    """

    def __init__(
        self, runtime: Runtime, choice: Literal["auto", "deep_gemm", "triton"] = "auto"
    ) -> None:
        self._runtime = runtime
        self._is_demanded = choice == "deep_gemm"
        self._deep_gemm = None if choice == "triton" else runtime.deep_gemm
        assert self._deep_gemm or not self._is_demanded, "its absence was an error at loading"

    def metadata(
        self, context_lens: torch.Tensor, block_size: int, num_workers: int, mode: ForwardMode
    ) -> PagedMQAMetadata:
        """Own a copy of the lengths, and the schedule made from it. Waits for the longest.

        Kernels get lengths of at least 1: the planner of SM90 reads past its sums where all of 32
        rows are 0. One more number lies behind them, which workers without work may read.

        Raises:
            ContractError: the lengths are of another shape or dtype, or negative.
            ConfigError: DeepGEMM was asked for and cannot plan this.
        """
        check_lens(context_lens, num_workers)
        rows, next_n = context_lens.shape
        plan = self._plan(rows, next_n, block_size, num_workers)
        with_spare = context_lens.new_ones(rows * next_n + 1)
        planned = with_spare[:-1].view(rows, next_n)
        planned.copy_(context_lens.clamp(min=1))
        if plan.tokens > 1:
            # The last length of a row counts for all of it.
            planned[:, -1] = planned.amax(dim=1)
        return PagedMQAMetadata(
            mode=mode,
            rows=rows,
            next_n=next_n,
            block_size=block_size,
            num_workers=num_workers,
            max_context_len=_longest(context_lens),
            buffers=PagedMQABuffers(
                context_lens.clone(),
                self._schedule(plan, planned.view(-1, plan.tokens), block_size, num_workers),
                planned,
            ),
        )

    def logits(
        self,
        query: torch.Tensor,
        key_pages: IndexKeyPages,
        weights: torch.Tensor,
        page_table: torch.Tensor,
        metadata: PagedMQAMetadata,
    ) -> torch.Tensor:
        """Score cached keys; waits for nothing, and may be captured, unless queries are float32.

        Float32 queries are scored exactly. Float8 keys are multiplied by queries that are
        quantised for each row and head; those and bfloat16 keys are summed in float32.

        Returns:
            float32 ``[rows * next_n, columns]``; columns past a row's length are undefined.

        Raises:
            StaleScheduleError: the plan was refreshed since this description of it was made.
            ContractError: anything differs from what was planned.
            ConfigError: DeepGEMM was asked for and cannot score this.
        """
        launch = Launch(query, key_pages, weights, page_table, metadata)
        launch.check()
        if not weights.shape[0] or not metadata.max_context_len:
            return weights.new_empty(weights.shape[0], metadata.max_context_len)
        if query.dtype is torch.float32:
            return reference.paged_mqa_logits(query, key_pages, weights, page_table, metadata)
        plan = self._plan(metadata.rows, metadata.next_n, metadata.block_size, metadata.num_workers)
        deep_gemm = self._deep_gemm if plan.by_deep_gemm else None
        if deep_gemm is not None:
            why_not = _why_not(deep_gemm, launch)
            if not why_not:
                return _by_deep_gemm(self._runtime.programs, deep_gemm, plan, launch)
            self._refuse_if_demanded(why_not)
        return self._by_program(plan, launch)

    def _plan(self, rows: int, next_n: int, block_size: int, num_workers: int) -> Plan:
        deep_gemm = self._deep_gemm
        if deep_gemm is None:
            return Plan(by_deep_gemm=False)
        native = next_n <= deep_gemm.most_native_next_n
        why_not = _why_not_planned(
            deep_gemm, rows if native else rows * next_n, block_size, num_workers
        )
        if why_not:
            self._refuse_if_demanded(why_not)
            return Plan(by_deep_gemm=False)
        if not native:
            return Plan(by_deep_gemm=True)
        entry_tokens = next_n if self._runtime.chip.architecture.is_blackwell else 1
        return Plan(by_deep_gemm=True, tokens=next_n, entry_tokens=entry_tokens)

    def _schedule(
        self, plan: Plan, lens: torch.Tensor, block_size: int, num_workers: int
    ) -> torch.Tensor:
        if not plan.by_deep_gemm or self._deep_gemm is None or not lens.numel():
            return sm90_schedule(lens, num_workers)
        if self._runtime.chip.architecture.is_blackwell:
            return self._deep_gemm.paged_mqa_metadata(lens, block_size, num_workers)
        # Its planner for SM90 is compiled for every 32 rows more; here for powers of two. Rows
        # without keys behind the others change nothing but where the last worker ends.
        padded = lens.new_zeros(max(32, 1 << (len(lens) - 1).bit_length()), lens.shape[1])
        padded[: len(lens)] = lens
        schedule = self._deep_gemm.paged_mqa_metadata(padded, block_size, num_workers)
        schedule[-1, 0] = len(lens) * ((lens.shape[1] + 1) // 2)
        return schedule

    def _by_program(self, plan: Plan, launch: Launch) -> torch.Tensor:
        programs, weights = self._runtime.programs, launch.weights
        query_TND = launch.query.flatten(0, 1)
        if launch.key_pages.scales is None:
            query_TND, weights = query_TND.contiguous(), weights.contiguous()
        else:
            query_TND, weights = paged_mqa.quantise_queries(
                programs, query_TND, weights, query_TND.shape[1]
            )
        logits = weights.new_empty(len(weights), _columns(launch.metadata.max_context_len))
        if self._runtime.emulated:
            logits.fill_(torch.nan)
        paged_mqa.score(
            programs,
            query_TND,
            launch.key_pages,
            weights,
            launch.page_table,
            launch.planned_lens.view(-1, plan.tokens),
            launch.schedule,
            logits,
            plan.entry_tokens,
        )
        return logits

    def _refuse_if_demanded(self, why_not: str) -> None:
        if self._is_demanded:
            raise ConfigError(
                f"indexer = 'deep_gemm', and DeepGEMM cannot score the index keys: {why_not}",
                remedy="set indexer to 'auto' or 'triton'",
            )


def _by_deep_gemm(
    programs: Programs, deep_gemm: DeepGEMM, plan: Plan, launch: Launch
) -> torch.Tensor:
    """Rows of more tokens than it takes become rows of one, with the pages of their request."""
    heads = _heads_for(deep_gemm, launch.query.shape[2])
    assert heads is not None
    values, folded = paged_mqa.quantise_queries(
        programs, launch.query.flatten(0, 1), launch.weights, heads
    )
    repeats = launch.metadata.next_n // plan.tokens
    page_table = launch.page_table
    return deep_gemm.paged_mqa_logits(
        values.unflatten(0, (-1, plan.tokens)),
        fused_kv(launch.key_pages),
        folded,
        launch.planned_lens.view(-1, plan.tokens),
        page_table if repeats == 1 else page_table.repeat_interleave(repeats, dim=0),
        launch.schedule,
        launch.metadata.max_context_len,
    )


def _why_not_planned(deep_gemm: DeepGEMM, rows: int, block_size: int, num_workers: int) -> str:
    """Why DeepGEMM does not plan this; nothing if it does."""
    if deep_gemm.no_paged_mqa:
        return deep_gemm.no_paged_mqa
    if block_size not in deep_gemm.block_sizes:
        return f"pages of {block_size} keys are none of its {deep_gemm.block_sizes}"
    if num_workers != deep_gemm.num_sms():
        return f"it plans for {deep_gemm.num_sms()} workers, not for {num_workers}"
    if rows > MOST_PLANNED_ROWS:
        return f"{rows} rows do not fit in its planner's shared memory"
    return ""


def _why_not(deep_gemm: DeepGEMM, launch: Launch) -> str:
    """Why DeepGEMM does not take these queries and keys; nothing if it does."""
    heads, dim = launch.query.shape[2:]
    if launch.key_pages.scales is None:
        return (
            f"they are cached as {launch.key_pages.keys.dtype}, and it takes float8 "
            "(index_key_dtype = 'fp8')"
        )
    if _heads_for(deep_gemm, heads) is None or dim not in deep_gemm.head_dims:
        return (
            f"{heads} heads of {dim} numbers, and it takes up to {max(deep_gemm.head_counts)} of "
            f"{', '.join(map(str, deep_gemm.head_dims))}"
        )
    return ""


def _heads_for(deep_gemm: DeepGEMM, heads: int) -> int | None:
    """The fewest heads that DeepGEMM takes and that these fit in."""
    return min((count for count in deep_gemm.head_counts if count >= heads), default=None)


def _columns(longest: int) -> int:
    multiple = paged_mqa.COLUMN_MULTIPLE
    return -(-longest // multiple) * multiple


def _longest(context_lens: torch.Tensor) -> int:
    """The longest length; one wait for the device tells the shortest too."""
    if not context_lens.numel():
        return 0
    shortest, longest = torch.stack(context_lens.aminmax()).tolist()
    if shortest < 0:
        raise ContractError(
            f"a context length of {shortest}",
            reason=ReasonCode.CONTRACT_BROKEN,
            expected="0 or more",
        )
    return int(longest)
