"""Compiling what a loaded model is going to use, before anybody waits for a token."""

from __future__ import annotations

import os
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from mortise.backends import Decision
from mortise.backends.causes import cause_and_consequences
from mortise.errors import ContractError, MortiseError, WarmupError
from mortise.layers.in_use import experts_in_use, linears_in_use, qkv_shapes_in_use
from mortise.parallel.collectives import all_gather_integers
from mortise.spec.reasons import ReasonCode
from mortise.spec.roles import ModelRole
from mortise.spec.warmup import WarmupJob, WarmupRequest

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mortise.backends import BoundBackend, Ops
    from mortise.config import EngineConfig
    from mortise.engine.loading import LoadedModel
    from mortise.parallel.group import ExpertParallelGroup

    WarmupProgress = Callable[[int, int], None]
    """Told the jobs that are done and all there are."""

LARGEST_INTERVAL_SECONDS = 1.0
"""Processes tell each other at least this often that they are still compiling."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmedJob:
    """A job that was done, and the seconds that it took beside the others."""

    name: str
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmupReport:
    """A warm-up that ended well.

    Args:
        jobs: in the order in which the backend named them.
        threads: how many ran at a time.
        seconds: wall time of all, until every process was done.
    """

    jobs: tuple[WarmedJob, ...]
    threads: int
    seconds: float


def warmup_request(
    loaded: LoadedModel,
    config: EngineConfig,
    *,
    ahead: bool,
    role: ModelRole = ModelRole.MAIN,
) -> WarmupRequest:
    """What the model of one role is going to ask of its backend."""
    scheduler, rows = config.scheduler, 1 + config.draft.num_tokens
    of_role = loaded if role is ModelRole.MAIN else loaded.draft
    assert of_role is not None, "nothing drafts"
    model, facts = of_role.model, of_role.facts
    assert isinstance(model, nn.Module)
    return WarmupRequest(
        role=role,
        experts=experts_in_use(model),
        linears=linears_in_use(model),
        dispatch=of_role.dispatch,
        modes=loaded.modes,
        max_tokens=max(scheduler.max_num_batched_tokens, scheduler.max_num_seqs * rows),
        max_tokens_per_rank=config.dispatch.max_tokens_per_rank,
        num_experts_per_tok=facts.num_experts_per_tok,
        world_size=loaded.group.world_size,
        compute_dtype=loaded.dtype,
        index_heads=facts.index_num_heads,
        index_head_dim=facts.index_head_dim,
        index_key_dtype=of_role.index_key_dtype,
        qkv_shapes=qkv_shapes_in_use(model),
        ahead=ahead,
    )


def warmup_jobs(
    loaded: LoadedModel, config: EngineConfig, *, ahead: bool = False
) -> tuple[WarmupJob, ...]:
    """What the backend has to compile for the models of a run; nothing is compiled yet.

    Each thing is there once. A backend is bound once for each model, and what one of them has
    compiled the other finds where compiled code is kept.

    Raises:
        ContractError: the backend answers with something else than jobs.
    """
    bounds = [loaded.bound] if loaded.draft is None else [loaded.bound, loaded.draft.bound]
    unique: dict[object, WarmupJob] = {}
    for bound in bounds:
        request = warmup_request(loaded, config, ahead=ahead, role=bound.ops.role)
        for job in jobs_of(bound, request):
            unique.setdefault((bound.ops.role, job.key), job)
    return tuple(unique.values())


def jobs_of(bound: BoundBackend, request: WarmupRequest) -> Sequence[WarmupJob]:
    """What one backend answers.

    Raises:
        ContractError: something else than jobs.
    """
    try:
        answer: object = bound.backend.warmup(request)
    except Exception as error:
        error.add_note(f"in warmup of backend {bound.ops.backend}, role {request.role.value}")
        raise
    if not isinstance(answer, list | tuple) or not all(
        isinstance(job, WarmupJob) for job in answer
    ):
        raise ContractError(
            f"warmup() of backend {bound.ops.backend} returned {answer!r:.100}",
            reason=ReasonCode.CONTRACT_BROKEN,
            expected="a list or tuple of mortise.plugin.WarmupJob",
            remedy=f"report it to the authors of {bound.ops.backend.distribution}",
        )
    return answer


def run_jobs(
    jobs: Sequence[WarmupJob],
    *,
    backend: str,
    threads: int | None = None,
    group: ExpertParallelGroup,
    progress: WarmupProgress | None = None,
) -> WarmupReport:
    """Run all jobs, several at a time; processes of one group go on together.

    Args:
        jobs: each different from the others.
        backend: whose they are, for errors.
        threads: jobs that run at a time; None is the number of processors.
        group: the processes that share the model; each brings its own jobs.
        progress: told the jobs that are done and all there are, on the thread of the caller.

    Raises:
        WarmupError: a job failed; those that had not begun are dropped.
        RankLostError: another process failed or died.
    """
    started = time.perf_counter()
    count = min(threads or os.cpu_count() or 1, max(len(jobs), 1))
    pool = ThreadPoolExecutor(count, thread_name_prefix="mortise warm-up")
    try:
        futures = [pool.submit(_timed, job) for job in jobs]
        _follow(futures, jobs, backend, group, progress or (lambda _done, _total: None))
    finally:
        # What has not begun is dropped; the message does not wait for what has.
        pool.shutdown(wait=False, cancel_futures=True)
    seconds = (future.result() for future in futures)
    return WarmupReport(
        jobs=tuple(
            WarmedJob(name=job.name, seconds=took) for job, took in zip(jobs, seconds, strict=True)
        ),
        threads=count,
        seconds=time.perf_counter() - started,
    )


def warmup_decision(ops: Ops, num_jobs: int, report: WarmupReport | None) -> Decision:
    """What a start compiles before the engine is ready, or what was compiled.

    Args:
        ops: the bound backend.
        num_jobs: how much there is.
        report: of the warm-up, if it was run.
    """
    value = f"{num_jobs} jobs"
    if report is not None:
        value += f" in {report.seconds:.1f} s, {report.threads} at a time"
    return Decision(
        role=ops.role,
        subject="warm-up",
        value=value,
        rule="backend",
        reason=f"what {ops.backend.name} compiles for this model before it is ready",
    )


def _timed(job: WarmupJob) -> float:
    started = time.perf_counter()
    # As in a forward pass; the mode belongs to a thread.
    with torch.inference_mode():
        job.run()
    return time.perf_counter() - started


def _follow(
    futures: Sequence[Future[float]],
    jobs: Sequence[WarmupJob],
    backend: str,
    group: ExpertParallelGroup,
    progress: WarmupProgress,
) -> None:
    """Return when every job of every process is done.

    A process that is done waits for the others only as long as the group allows; so all of them
    meet again and again until none has work.
    """
    interval = min(LARGEST_INTERVAL_SECONDS, group.timeout_seconds / 4)
    pending: set[Future[float]] = set(futures)
    while True:
        if pending:
            progress(len(futures) - len(pending), len(futures))
            pending = wait(pending, timeout=interval, return_when=FIRST_COMPLETED).not_done
            _raise_failure(futures, jobs, backend)
        ranks = all_gather_integers(group, [len(pending)], "the warm-up")
        if not any(left for (left,) in ranks):
            progress(len(futures), len(futures))
            return


def _raise_failure(
    futures: Sequence[Future[float]], jobs: Sequence[WarmupJob], backend: str
) -> None:
    for future, job in zip(futures, jobs, strict=True):
        error = future.exception() if future.done() else None
        if error is None:
            continue
        if isinstance(error, MortiseError):
            error.add_note(f"while warming up: {job.name} (backend {backend})")
            raise error
        what, lines = cause_and_consequences(error)
        raise WarmupError(
            f"warming up failed at {job.name}: {what}",
            reason=ReasonCode.WARMUP_FAILED,
            details=[*lines, f"backend {backend}"],
            remedy="mend the cause, then start again; what was compiled is kept where the backend"
            " keeps it",
        ) from error
