"""Decisions about dispatch formats: by the order of authority, and the same every time."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

from mortise.conformance.expert_cases import (
    LAYER,
    ExpertCase,
    dispatch_request,
    plain_layers,
)
from mortise.conformance.records import Check, FaultError, Level, NotAskedError
from mortise.errors import MortiseError
from mortise.plugin import (
    DecisionRule,
    DispatchDecision,
    DispatchDtype,
    DispatchMode,
    DispatchRequest,
    ExpertMethod,
    ModelRole,
    Override,
    ordinary_method,
)
from mortise.spec.consumer import format_problem

if TYPE_CHECKING:
    from mortise.backends import Ops
    from mortise.conformance.subject import Subject

HOOK: Final = "resolve_dispatch_dtype"


def _method(subject: Subject, case: ExpertCase) -> ExpertMethod:
    support = subject.ops.supports(case.request)
    if not support.ok:
        raise NotAskedError(f"supports() says no: {support.reason}")
    return support.method or ordinary_method(
        case.w13.scheme, case.dtype, static_input=case.w13.static_input
    )


def _decided(ops: Ops, request: DispatchRequest) -> DispatchDecision | str:
    """A decision, or the text of the refusal."""
    try:
        return ops.resolve_dispatch_dtype(request)
    except MortiseError as error:
        return error.what


def _requests(case: ExpertCase, method: ExpertMethod) -> list[DispatchRequest]:
    return [
        dispatch_request(case, method, mode, override)
        for mode in DispatchMode
        for override in (None, *DispatchDtype)
    ]


def decisions_are_the_same_every_time(subject: Subject, case: ExpertCase) -> None:
    """A request gets the same decision again, in another order, and in another role."""
    requests = _requests(case, _method(subject, case))
    first = [_decided(subject.ops, request) for request in requests]
    backwards = [_decided(subject.ops, request) for request in reversed(requests)][::-1]
    draft = subject.bind(ModelRole.DRAFT).ops
    others = [_decided(draft, replace(one, role=ModelRole.DRAFT)) for one in requests]
    for text, again in (("in another order", backwards), ("in another role", others)):
        for request, one, other in zip(requests, first, again, strict=True):
            if one != other:
                raise FaultError(
                    f"{HOOK} depends on more than its request: asked {text} it decides otherwise\n"
                    f"case: {case}, mode {request.mode.value}\nfirst: {one}\nthen:  {other}"
                )


def decisions_are_consistent(subject: Subject, case: ExpertCase) -> None:
    """A decision has a reason, a format that does not contradict itself, the mode that was asked
    for, a dtype that the experts accept and that the capabilities list.
    """
    method = _method(subject, case)
    for request in _requests(case, method):
        decision = _decided(subject.ops, request)
        if isinstance(decision, str):
            continue
        stated = decision.format
        problem = format_problem(stated)
        wrong = (
            (problem is not None, problem[0] if problem else ""),
            (not decision.reason, "it has no reason"),
            (stated.mode is not request.mode, f"its mode is {stated.mode.value}"),
            (
                stated.dtype not in request.accepted,
                f"{stated.dtype.value} rows are none that the experts accept",
            ),
            (
                stated.dtype not in subject.capabilities.dispatch_dtypes,
                f"{stated.dtype.value} is not among the dispatch dtypes of the capabilities",
            ),
            (stated.alignment < 1, f"its alignment is {stated.alignment}"),
        )
        for is_wrong, text in wrong:
            if is_wrong:
                raise FaultError(f"{HOOK} decides what cannot be: {text}\ncase: {case}: {decision}")


def decisions_follow_the_order_of_authority(subject: Subject, case: ExpertCase) -> None:
    """The user's override goes before the expert method, that before the device's default; what
    becomes another format says what was asked; what experts cannot consume is refused by name.
    """
    method = _method(subject, case)
    for mode in DispatchMode:
        for dtype in DispatchDtype:
            _require_override(subject, case, dispatch_request(case, method, mode, dtype))
        asked = dispatch_request(case, method, mode)
        decision = _decided(subject.ops, asked)
        wish = asked.requested_in_mode or asked.requested
        if asked.input_global_scale is not None:
            wish = DispatchDtype.NVFP4
        if wish is None or isinstance(decision, str):
            continue
        if wish not in {decision.format.dtype, decision.asked}:
            raise FaultError(
                f"{HOOK} passes over the expert method, which asks for {wish.value}\n"
                f"case: {case}: {decision}"
            )
        if decision.rule is not DecisionRule.EXPERT_METHOD:
            raise FaultError(f"{HOOK} gives the rule {decision.rule} for what the method asks for")


def _require_override(subject: Subject, case: ExpertCase, request: DispatchRequest) -> None:
    assert isinstance(request.override, Override)
    wanted, decision = request.override.value, _decided(subject.ops, request)
    if isinstance(decision, str):
        if LAYER not in decision or wanted.value not in decision:
            raise FaultError(
                f"{HOOK} refuses {wanted.value} without naming the layer and the value: {decision}"
            )
        return
    if wanted not in {decision.format.dtype, decision.asked}:
        raise FaultError(
            f"{HOOK} passes over the user's override {wanted.value}\ncase: {case}: {decision}"
        )
    if decision.rule is not DecisionRule.OVERRIDE or decision.source != request.override.source:
        raise FaultError(
            f"{HOOK} does not say that the user's override decided: rule {decision.rule}, source"
            f" {decision.source!r}"
        )


def _check(run: object) -> Check:
    return Check(run=run, level=Level.HOST, hook=HOOK, cases=plain_layers)  # type: ignore[arg-type]


CHECKS: Final = (
    _check(decisions_are_the_same_every_time),
    _check(decisions_are_consistent),
    _check(decisions_follow_the_order_of_authority),
)
