"""The exchange of a backend within one process: who gets which row, and what comes home."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

import torch

from mortise.conformance.comparison import Untouched, relative_errors, require_close
from mortise.conformance.draws import draw_rows
from mortise.conformance.expert_cases import (
    LAYER,
    NUM_EXPERTS,
    ExpertCase,
    decisions,
    plain_layers,
)
from mortise.conformance.records import Check, FaultError, Level, Measured, NotAskedError, worst
from mortise.conformance.subject import moved
from mortise.conformance.tolerances import MARGIN, ROW_MARGIN, STEP, UNIT, Tolerance
from mortise.formats.rows import dequantise_rows, quantise_rows
from mortise.plugin import (
    NOT_SUPPORTED,
    DispatchDecision,
    DispatchDtype,
    DispatchedTokens,
    DispatchMode,
    ModelRole,
    Routing,
    TokenDispatcher,
    TokenDispatcherRequest,
    WeightScheme,
    ordinary_method,
)
from mortise.testing.poison import POISON, defined_rows

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mortise.conformance.subject import Subject

HOOK: Final = "create_token_dispatcher"
MOST_TOKENS: Final = 32
NUM_CHOSEN: Final = 3

STEPS: Final[Mapping[DispatchDtype, float]] = MappingProxyType(
    {
        DispatchDtype.FP32: 0.0,
        DispatchDtype.BF16: 0.0,
        DispatchDtype.INT8: STEP[WeightScheme.W8A8],
        DispatchDtype.FP8_E4M3: STEP[WeightScheme.FP8_BLOCK],
        DispatchDtype.NVFP4: STEP[WeightScheme.NVFP4],
    }
)

ROUTINGS: Final[Mapping[str, tuple[tuple[int, ...], ...]]] = MappingProxyType(
    {
        "spread": ((0, 1, 2), (2, 3, 1), (1, 0, 3), (3, 2, 0), (0, 2, 1), (2, 0, 3), (3, 1, 2)),
        "one expert has all tokens": ((2, -1, -1),) * 5,
        "an expert twice, and none": ((1, 1, 3), (-1, -1, -1), (-1, 3, -1), (0, 0, 2)),
        "one token": ((3, 0, 1),),
        "no tokens": (),
    }
)


@dataclass(frozen=True, slots=True)
class Exchange:
    """A dispatcher with the decision that it is given."""

    case: ExpertCase
    decision: DispatchDecision
    dispatcher: TokenDispatcher

    def __str__(self) -> str:
        stated = self.decision.format
        return f"{stated.dtype.value} rows, {stated.row_layout.value}, mode {stated.mode.value}"


def _exchanges(subject: Subject, case: ExpertCase) -> list[Exchange]:
    support = subject.ops.supports(case.request)
    if not support.ok:
        raise NotAskedError(f"supports() says no: {support.reason}")
    method = support.method or ordinary_method(
        case.w13.scheme, case.dtype, static_input=case.w13.static_input
    )
    found = [
        Exchange(case, decision, dispatcher)
        for decision in decisions(subject.ops, case, method)
        if (dispatcher := _dispatcher(subject, case, decision)) is not None
    ]
    if not found:
        raise NotAskedError("it leaves the exchange within one process to the core")
    return found


def _dispatcher(
    subject: Subject, case: ExpertCase, decision: DispatchDecision
) -> TokenDispatcher | None:
    found = subject.ops.create_token_dispatcher(
        TokenDispatcherRequest(
            role=ModelRole.MAIN,
            layer=LAYER,
            num_experts=NUM_EXPERTS,
            num_experts_per_tok=NUM_CHOSEN,
            hidden_size=case.hidden,
            mode=decision.format.mode,
            max_tokens_per_rank=MOST_TOKENS,
            format=decision.format,
        )
    )
    return None if found is NOT_SUPPORTED else found


@dataclass(frozen=True, slots=True)
class Sent:
    """One dispatch: what went in and what arrived, with each row's token."""

    hidden: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    tokens: DispatchedTokens
    handle: Any


def _send(
    subject: Subject, one: Exchange, choices: tuple[tuple[int, ...], ...], seed: int = 0
) -> Sent:
    count = len(choices)
    hidden = draw_rows(count, one.case.hidden, one.case.dtype, seed=seed + 31)
    ids = torch.tensor(choices, dtype=torch.int64).view(count, NUM_CHOSEN)
    weights = 0.2 + torch.rand(count, NUM_CHOSEN, generator=torch.Generator().manual_seed(seed))
    routing = Routing(topk_ids=subject.there(ids), topk_weights=subject.there(weights))
    there = subject.there(hidden)
    before = Untouched(hidden_TH=there, routing=routing)
    tokens, handle = one.dispatcher.dispatch(there, routing, one.decision.format)
    if tokens.receive is not None:
        tokens.receive()
    before.require("dispatch", f"{one.case}, {one}")
    return Sent(hidden, ids, weights, tokens, handle)


def _on_host(tokens: DispatchedTokens) -> DispatchedTokens:
    found: DispatchedTokens = moved(tokens, torch.device("cpu"))
    return found


def _token_of_row(sent: Sent, one: Exchange) -> list[list[int]]:
    """For each expert the tokens whose rows it got, by what is in them.

    Raises:
        FaultError: a row is no token's.
    """
    tokens = _on_host(sent.tokens)
    stated = tokens.format
    rows, scales = quantise_rows(sent.hidden, stated)
    known = dequantise_rows(rows, scales, stated, torch.float32)
    defined = defined_rows(tokens)
    arrived = dequantise_rows(tokens.rows, tokens.scales, stated, torch.float32)[defined]
    allowed = 2 * STEPS[stated.dtype] / sqrt(one.case.hidden)
    found: list[int] = []
    for place, row in enumerate(arrived):
        _, errors = relative_errors(row.expand_as(known), known)
        nearest = int(errors.argmin()) if len(errors) else -1
        if nearest < 0 or float(errors[nearest]) > allowed:
            raise FaultError(
                f"dispatch: row {place} of {len(arrived)} is none of the tokens in the format that"
                f" was decided\ncase: {one.case}, {one}"
            )
        found.append(nearest)
    counts = tokens.group_list.tolist()
    if tokens.group_list_kind.value == "cumulative":
        counts = [end - start for start, end in zip([0, *counts], counts, strict=False)]
    groups, start = [], 0
    for count in counts:
        groups.append(found[start : start + count])
        start += count
    return groups


def rows_reach_the_experts_that_were_chosen(subject: Subject, case: ExpertCase) -> None:
    """Each expert's group holds the tokens that chose it, quantised as the format says; the group
    list counts them.
    """
    for one in _exchanges(subject, case):
        for what, choices in ROUTINGS.items():
            sent = _send(subject, one, choices)
            where = f"case: {case}, {one}, {what}"
            if tuple(sent.tokens.group_list.shape) != (NUM_EXPERTS,):
                raise FaultError(f"dispatch: the group list is none of {NUM_EXPERTS}\n{where}")
            if sent.tokens.format != one.decision.format:
                raise FaultError(f"dispatch: rows state another format than was decided\n{where}")
            if sent.tokens.group_counts is not None and (
                list(sent.tokens.group_counts) != _counted(sent.tokens)
            ):
                raise FaultError(f"dispatch: counts on the host and the device differ\n{where}")
            groups = _token_of_row(sent, one)
            for expert, group in enumerate(groups):
                chosen = [
                    token for token, ids in enumerate(choices) for each in ids if each == expert
                ]
                # One row may serve a token that names an expert twice.
                if sorted(group) not in (sorted(chosen), sorted(set(chosen))):
                    raise FaultError(
                        f"dispatch: the group list is unsorted, or counts wrongly: the group of"
                        f" expert {expert} holds tokens {group}, and {chosen} chose it\n{where}"
                    )


def _counted(tokens: DispatchedTokens) -> list[int]:
    counts = tokens.group_list.cpu()
    if tokens.group_list_kind.value == "cumulative":
        counts = counts.diff(prepend=counts.new_zeros(1))
    return [int(count) for count in counts]


def _results(
    subject: Subject, sent: Sent, one: Exchange, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows as experts would return them, poison where there are none, and their weighted sums."""
    hidden, dtype = one.case.hidden, one.case.dtype
    made = draw_rows(max(len(sent.ids), 1) * NUM_EXPERTS, hidden, dtype, seed=seed + 77)
    made = made.view(-1, NUM_EXPERTS, hidden)
    tokens = _on_host(sent.tokens)
    shape = (*tokens.rows.shape[:-1], hidden)
    rows = torch.empty(shape, dtype=dtype)
    rows.view(torch.uint8).fill_(POISON)
    groups = _token_of_row(sent, one)
    own = [made[token, expert] for expert, group in enumerate(groups) for token in group]
    if own:
        rows[defined_rows(tokens)] = torch.stack(own)
    expected = torch.zeros(len(sent.ids), hidden, dtype=torch.float64)
    for token, (ids, weights) in enumerate(
        zip(sent.ids.tolist(), sent.weights.tolist(), strict=True)
    ):
        for expert, weight in zip(ids, weights, strict=True):
            if expert >= 0:
                expected[token] += weight * made[token, expert].double()
    return subject.there(rows), expected


def _tolerance(dtype: torch.dtype) -> Tolerance:
    spread = 2 * UNIT[dtype]
    return Tolerance(MARGIN * spread, ROW_MARGIN * MARGIN * spread)


def combining_sums_by_routing_weight(subject: Subject, case: ExpertCase) -> Measured | None:
    """Each token gets the sum of its experts' rows by routing weight, zeros where it chose none;
    undefined rows are not read, and the result shares no memory with them.
    """
    measured = []
    for one in _exchanges(subject, case):
        for what, choices in ROUTINGS.items():
            sent = _send(subject, one, choices)
            rows, expected = _results(subject, sent, one)
            before = Untouched(rows_RH=rows)
            found = one.dispatcher.combine(rows, sent.handle)
            where = f"{case}, {one}, {what}"
            before.require("combine", where)
            before.require_apart(found, "combine", where)
            if tuple(found.shape) != (len(choices), case.hidden):
                raise FaultError(f"combine returned {list(found.shape)}\ncase: {where}")
            measured.append(
                require_close(
                    found.cpu(),
                    expected,
                    _tolerance(case.dtype),
                    subject=f"combine of {one.decision.format.dtype.value} rows",
                    case=where,
                )
            )
    return worst(measured)


def dispatches_do_not_mix(subject: Subject, case: ExpertCase) -> None:
    """What a dispatch must remember is in its handle: two that overlap come home, in any order."""
    for one in _exchanges(subject, case):
        first = _send(subject, one, ROUTINGS["spread"], seed=1)
        rows_1, expected_1 = _results(subject, first, one, seed=1)
        second = _send(subject, one, ROUTINGS["an expert twice, and none"], seed=2)
        rows_2, expected_2 = _results(subject, second, one, seed=2)
        for rows, sent, expected in ((rows_1, first, expected_1), (rows_2, second, expected_2)):
            found = one.dispatcher.combine(rows, sent.handle)
            require_close(
                found.cpu(),
                expected,
                _tolerance(case.dtype),
                subject="combine after another dispatch",
                case=f"{case}, {one}",
            )


def too_many_tokens_are_refused(subject: Subject, case: ExpertCase) -> None:
    """A low-latency dispatch of more tokens than it was made for raises."""
    exchanges = [
        one
        for one in _exchanges(subject, case)
        if one.decision.format.mode is DispatchMode.LOW_LATENCY
    ]
    if not exchanges:
        raise NotAskedError("it has no low-latency exchange within one process")
    for one in exchanges:
        try:
            _send(subject, one, ((0, 1, 2),) * (MOST_TOKENS + 1))
        except FaultError:
            raise
        except Exception as error:
            if "token" not in str(error):
                raise FaultError(
                    f"dispatch of too many tokens: an error that does not say so: {error}"
                ) from error
            continue
        raise FaultError(
            f"dispatch took {MOST_TOKENS + 1} tokens where {MOST_TOKENS} have places\n"
            f"case: {case}, {one}"
        )


def _check(run: object) -> Check:
    return Check(run=run, level=Level.DEVICE, hook=HOOK, cases=plain_layers)  # type: ignore[arg-type]


CHECKS: Final = (
    _check(rows_reach_the_experts_that_were_chosen),
    _check(combining_sums_by_routing_weight),
    _check(dispatches_do_not_mix),
    _check(too_many_tokens_are_refused),
)
