"""The indexer's schedule and scores against the reference."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Final

import torch

from mortise.conformance.comparison import (
    Untouched,
    is_within,
    require_close,
    require_same,
)
from mortise.conformance.indexer_cases import (
    IndexCase,
    Launch,
    draw_launch,
    launches,
    plain_launches,
    visible,
    without_scales,
)
from mortise.conformance.records import Check, FaultError, Level, Measured, NotAskedError, worst
from mortise.errors import MortiseError, StaleScheduleError
from mortise.plugin import (
    SPLIT_TOKENS,
    ForwardMode,
    PagedMQAMetadata,
    refresh_paged_mqa_metadata,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mortise.conformance.subject import Subject

PLAN: Final = "paged_mqa_metadata"
SCORE: Final = "paged_mqa_logits"


def _plan(
    subject: Subject, case: IndexCase, launch: Launch, mode: ForwardMode = ForwardMode.DECODE
) -> PagedMQAMetadata:
    workers = subject.capabilities.num_workers
    return launch.planned(subject.ops, case.block_size, mode, workers)


def _found(
    subject: Subject, case: IndexCase, launch: Launch, metadata: PagedMQAMetadata
) -> torch.Tensor:
    """Of the backend, checked for shape and dtype."""
    found: object = launch.scored(subject.ops, metadata)
    rows, columns = launch.lens.numel(), metadata.max_context_len
    if not isinstance(found, torch.Tensor) or found.dtype is not torch.float32:
        kind = getattr(found, "dtype", type(found).__name__)
        raise FaultError(f"{SCORE}: scores have the wrong dtype: {kind}, not torch.float32")
    if found.dim() != 2 or found.shape[0] != rows or found.shape[1] < columns:
        raise FaultError(
            f"{SCORE} returned {list(found.shape)}, not [{rows}, at least {columns}]\ncase: {case}"
        )
    return found


def expected_scores(subject: Subject, case: IndexCase, launch: Launch) -> torch.Tensor:
    """Of the reference."""
    plan = launch.planned(subject.reference, case.block_size, ForwardMode.DECODE, 1)
    return launch.scored(subject.reference, plan)


def _compared(subject: Subject, case: IndexCase, launch: Launch, mode: ForwardMode) -> Measured:
    own = launch.on(subject.capabilities.device)
    found = _found(subject, case, own, _plan(subject, case, own, mode))
    expected = visible(expected_scores(subject, case, launch), launch.lens)
    seen = visible(found, launch.lens)
    typical = expected.pow(2).sum() / launch.lens.sum().clamp(min=1)
    sizes = (typical * launch.lens.flatten()).sqrt()

    def explain() -> str:
        return _looks(subject, case, launch, seen)

    return require_close(
        seen,
        expected,
        case.tolerance,
        subject=case.subject,
        case=f"{case}, mode {mode.value}, lengths {launch.lens[:, -1].tolist()}",
        explain=explain,
        sizes=sizes,
    )


def _looks(subject: Subject, case: IndexCase, launch: Launch, seen: torch.Tensor) -> str:
    """The reference with one thing changed, compared again."""
    for text, changed in changed_launches(launch):
        scores = visible(expected_scores(subject, case, changed), launch.lens)
        finite = torch.nan_to_num(scores, nan=0.0)
        if is_within(torch.nan_to_num(seen, nan=0.0), finite, case.tolerance):
            return text
    expected = visible(expected_scores(subject, case, launch), launch.lens)
    for shift, text in ((1, "scores stand one column too far"), (-1, "scores lack a column")):
        if is_within(seen, visible(expected.roll(shift, dims=1), launch.lens), case.tolerance):
            return text
    off = (seen - expected).abs() > case.tolerance.row * expected.abs().mean()
    wrong_rows = off.any(dim=1).nonzero().flatten().tolist()
    if wrong_rows == [len(seen) - 1]:
        return "the last row is missing"
    first = off.any(dim=0).nonzero().flatten().tolist()[:1]
    if first and first[0] and first[0] % case.block_size == 0:
        page = first[0] // case.block_size
        return f"keys are taken from the wrong page, from page {page} of a row on: off by one?"
    return ""


def changed_launches(launch: Launch) -> Iterator[tuple[str, Launch]]:
    """A launch as it would be with a usual mistake in it."""
    if launch.pages.scales is not None:
        yield "scales of keys are ignored", without_scales(launch)
    for shift, word in ((1, "before"), (-1, "behind")):
        yield (
            f"keys are taken from the wrong page: off by one, the page {word} in the table",
            replace(launch, table=launch.table.roll(shift, dims=1)),
        )
    yield "all heads weigh the same", replace(launch, weights=torch.ones_like(launch.weights))


def scores_match_the_reference(subject: Subject, case: IndexCase) -> Measured:
    """Scores are the reference's in every mode, for lengths of none, one, a page and one more or
    less, a unit of work and one more or less, wherever pages lie; unwritten keys are not read.
    """
    launch = draw_launch(case)
    measured = [_compared(subject, case, launch, mode) for mode in ForwardMode]
    return worst(measured)


def a_pass_without_rows_is_scored(subject: Subject, case: IndexCase) -> None:
    """No row gives no row of scores, in every mode."""
    launch = draw_launch(case, requests=())
    launch = replace(
        launch,
        query=launch.query.new_empty(0, *launch.query.shape[1:]),
        table=launch.table.new_empty(0, 1),
    ).on(subject.capabilities.device)
    for mode in ForwardMode:
        _found(subject, case, launch, _plan(subject, case, launch, mode))


def scores_do_not_depend_on_other_rows(subject: Subject, case: IndexCase) -> Measured:
    """A row scores the same alone as beside the others, up to the order of sums."""
    launch = draw_launch(case)
    own = launch.on(subject.capabilities.device)
    together = visible(_found(subject, case, own, _plan(subject, case, own)), launch.lens)
    measured = []
    for row in (3, len(launch.lens) - 1):
        one = Launch(
            query=launch.query[row : row + 1],
            pages=launch.pages,
            weights=launch.weights[row * case.next_n : (row + 1) * case.next_n],
            table=launch.table[row : row + 1],
            lens=launch.lens[row : row + 1],
        ).on(subject.capabilities.device)
        alone = visible(_found(subject, case, one, _plan(subject, case, one)), one.lens)
        beside = together[row * case.next_n : (row + 1) * case.next_n, : alone.shape[1]]
        measured.append(
            require_close(
                alone,
                beside,
                case.tolerance,
                subject=case.subject,
                case=f"{case}, row {row} alone and beside others",
            )
        )
    return worst(measured)


def scores_leave_their_arguments_alone(subject: Subject, case: IndexCase) -> None:
    """Neither query nor cached keys nor tables are written to, and scores share no memory with
    them.
    """
    launch = draw_launch(case).on(subject.capabilities.device)
    metadata = _plan(subject, case, launch)
    before = Untouched(
        query=launch.query,
        key_pages=launch.pages,
        weights=launch.weights,
        page_table=launch.table,
        context_lens=metadata.context_lens,
    )
    found = _found(subject, case, launch, metadata)
    before.require(SCORE, case)
    before.require_apart(found, SCORE, case)
    again = _found(subject, case, launch, metadata)
    lens = launch.lens.cpu()
    require_same(visible(found, lens), visible(again, lens), f"{SCORE} does not repeat itself")


def plans_own_their_lengths(subject: Subject, case: IndexCase) -> None:
    """A plan keeps a copy of the lengths: whoever writes into the original changes no schedule."""
    launch = draw_launch(case).on(subject.capabilities.device)
    lens = launch.lens.clone()
    metadata = subject.ops.paged_mqa_metadata(
        lens, case.block_size, subject.capabilities.num_workers, ForwardMode.DECODE
    )
    lens.fill_(1)
    if not torch.equal(metadata.context_lens.cpu(), launch.lens.cpu()):
        raise FaultError(
            f"{PLAN}: aliasing: the plan shares the memory of context_lens, and changes with it\n"
            f"case: {case}"
        )


def plans_describe_what_they_are_for(subject: Subject, case: IndexCase) -> None:
    """Mode, rows, tokens a row, page size, workers and the longest length are those of the call,
    and lengths that a kernel plans with are at least one.
    """
    launch = draw_launch(case).on(subject.capabilities.device)
    workers = subject.capabilities.num_workers
    for mode in ForwardMode:
        plan = _plan(subject, case, launch, mode)
        if not isinstance(plan, PagedMQAMetadata):
            raise FaultError(f"{PLAN} returned a {type(plan).__name__}, not PagedMQAMetadata")
        found = (plan.mode, plan.rows, plan.next_n, plan.block_size, plan.num_workers)
        wanted = (mode, len(launch.lens), case.next_n, case.block_size, workers)
        if found != wanted:
            raise FaultError(f"{PLAN} describes {found}, and was asked for {wanted}")
        if plan.max_context_len != int(launch.lens.max()):
            raise FaultError(
                f"{PLAN}: max_context_len is {plan.max_context_len}, the longest row has"
                f" {int(launch.lens.max())}"
            )
        if plan.planned_lens is not None and int(plan.planned_lens.min()) < 1:
            raise FaultError(f"{PLAN}: a length of zero is planned as it is, not as one")


def schedules_cover_each_unit_once(subject: Subject, case: IndexCase) -> None:
    """A schedule of the documented form gives each unit of 256 keys of each row to one worker, and
    no worker two units more than another.
    """
    if case.next_n != 1:
        raise NotAskedError("units of rows of several tokens are numbered by the backend")
    launch = draw_launch(case).on(subject.capabilities.device)
    workers = subject.capabilities.num_workers
    schedule = _plan(subject, case, launch).schedule
    if schedule is None or tuple(schedule.shape) != (workers + 1, 2):
        raise NotAskedError("the schedule has a form of its own, and is judged by the scores")
    lens = launch.lens.cpu().flatten().clamp(min=1).tolist()
    units = [-(-length // SPLIT_TOKENS) for length in lens]
    starts = [sum(units[:row]) for row in range(len(units))] + [sum(units)]
    entries = schedule.cpu().tolist()
    places = [starts[row] + unit if row < len(starts) else -1 for row, unit in entries]
    shares = [end - start for start, end in pairwise(places)]
    if places[0] != 0 or places[-1] != sum(units) or min(shares) < 0:
        raise FaultError(
            f"{PLAN}: the schedule does not cover each (row, unit) exactly once: it goes from unit"
            f" {places[0]} to {places[-1]} of {sum(units)}, shares {shares}\ncase: {case}"
        )
    if max(shares) - min(shares) > 1:
        raise FaultError(f"{PLAN}: work is shared unevenly: {shares}\ncase: {case}")


def stale_schedules_are_refused(subject: Subject, case: IndexCase) -> None:
    """A launch with the description of a plan that was refreshed since raises."""
    stale, fresh, launch = _refreshed(subject, case)
    try:
        launch.scored(subject.ops, stale)
    except StaleScheduleError:
        return
    except MortiseError as error:
        raise FaultError(
            f"{SCORE} with a stale schedule raised {type(error).__name__}, not StaleScheduleError"
        ) from error
    del fresh
    raise FaultError(
        f"{SCORE} took a stale schedule: it was made for other lengths, and a kernel may never end"
        f"\ncase: {case}"
    )


def refreshed_plans_are_as_good_as_new(subject: Subject, case: IndexCase) -> None:
    """After a refresh in place, scores are those of a plan of its own."""
    _, refreshed, launch = _refreshed(subject, case)
    new = _plan(subject, case, launch)
    lens = launch.lens.cpu()
    require_same(
        visible(_found(subject, case, launch, new), lens),
        visible(_found(subject, case, launch, refreshed), lens),
        f"{SCORE} after refresh_paged_mqa_metadata ({case})",
    )


def _refreshed(
    subject: Subject, case: IndexCase
) -> tuple[PagedMQAMetadata, PagedMQAMetadata, Launch]:
    """A stale description, what the refresh made of it, and the launch that it is for."""
    device = subject.capabilities.device
    old, new = draw_launch(case).on(device), draw_launch(case).on(device)
    shorter = torch.cat([new.lens[:-1], (new.lens[-1:] - 70).clamp(min=0)])
    new = replace(new, lens=shorter.contiguous())
    stale = _plan(subject, case, old)
    refreshed = refresh_paged_mqa_metadata(stale, _plan(subject, case, new))
    return stale, refreshed, new


def mismatched_launches_are_refused(subject: Subject, case: IndexCase) -> None:
    """Rows of query, weights and page table that differ from the plan's raise before a launch."""
    launch = draw_launch(case).on(subject.capabilities.device)
    metadata = _plan(subject, case, launch)
    wrong = {
        "query": replace(launch, query=launch.query[:-1]),
        "weights": replace(launch, weights=launch.weights[: -case.next_n]),
        "page_table": replace(launch, table=launch.table[:-1]),
    }
    for name, bad in wrong.items():
        try:
            bad.scored(subject.ops, metadata)
        except (MortiseError, AssertionError):
            continue
        raise FaultError(f"{SCORE} took a {name} of fewer rows than were planned\ncase: {case}")


def _check(run: object, hook: str, cases: object = plain_launches) -> Check:
    return Check(run=run, level=Level.DEVICE, hook=hook, cases=cases)  # type: ignore[arg-type]


CHECKS: Final = (
    _check(plans_own_their_lengths, PLAN),
    _check(plans_describe_what_they_are_for, PLAN, launches),
    _check(schedules_cover_each_unit_once, PLAN),
    _check(scores_match_the_reference, SCORE, launches),
    _check(a_pass_without_rows_is_scored, SCORE, launches),
    _check(scores_do_not_depend_on_other_rows, SCORE),
    _check(scores_leave_their_arguments_alone, SCORE),
    _check(stale_schedules_are_refused, SCORE),
    _check(refreshed_plans_are_as_good_as_new, SCORE),
    _check(mismatched_launches_are_refused, SCORE),
)
