"""Each claimed scheme of experts against the reference, and what the hook may not do."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

import torch

from mortise.conformance.comparison import (
    Untouched,
    require_close,
    require_same,
    require_shape,
    same_bytes,
)
from mortise.conformance.draws import draw_rows
from mortise.conformance.expert_cases import (
    COUNTS,
    USUAL_COUNTS,
    ExpertCase,
    draw_tokens,
    layer_of,
    layers,
    plain_layers,
    prepared,
)
from mortise.conformance.records import Check, FaultError, Level, Measured, NotAskedError, worst
from mortise.conformance.what_if import wrong_experts
from mortise.errors import MortiseError
from mortise.plugin import (
    DispatchDtype,
    RoutingWeightSide,
    RowLayout,
    ScaleLayout,
    WeightScheme,
)
from mortise.testing.poison import defined_rows

if TYPE_CHECKING:
    from mortise.conformance.expert_cases import Layer
    from mortise.conformance.subject import Subject
    from mortise.plugin import DispatchDecision, DispatchedTokens

HOOK: Final = "quantized_moe_apply"


def _compared(subject: Subject, layer: Layer, tokens: DispatchedTokens, what: str) -> Measured:
    found, expected = layer.found(subject, tokens), layer.expected(subject, tokens)
    tolerance = layer.case.tolerance(len(expected))
    return require_close(
        found,
        expected,
        tolerance,
        subject=layer.case.subject,
        case=f"{layer.case}, {what}",
        explain=lambda: wrong_experts(subject, layer, tokens, found, expected, tolerance),
    )


def _said(decision: DispatchDecision) -> str:
    stated = decision.format
    return f"{stated.dtype.value} rows, {stated.row_layout.value}, mode {stated.mode.value}"


def experts_match_the_reference(subject: Subject, case: ExpertCase) -> Measured:
    """Experts give what the reference gives, however rows arrive and whoever has how many."""
    layer, measured = layer_of(subject, case), []
    for decision in layer.arrivals:
        patterns = COUNTS if decision is layer.arrivals[0] else {"uneven groups": USUAL_COUNTS}
        for what, counts in patterns.items():
            tokens = draw_tokens(counts, case.hidden, case.dtype, decision.format)
            measured.append(_compared(subject, layer, tokens, f"{_said(decision)}, {what}"))
    return worst(measured)


def experts_take_every_group_list(subject: Subject, case: ExpertCase) -> Measured:
    """Counts on the device alone, and cumulative ends, mean what counts on the host mean."""
    layer, measured = layer_of(subject, case), []
    for decision in layer.arrivals:
        is_flat = decision.format.row_layout is RowLayout.GROUPED
        for cumulative in (False, True) if is_flat else (False,):
            tokens = draw_tokens(
                USUAL_COUNTS,
                case.hidden,
                case.dtype,
                decision.format,
                host_counts=False,
                cumulative=cumulative,
            )
            kind = "cumulative ends" if cumulative else "counts on the device"
            measured.append(_compared(subject, layer, tokens, f"{_said(decision)}, {kind}"))
    return worst(measured)


def experts_take_extreme_rows(subject: Subject, case: ExpertCase) -> Measured:
    """Rows of zeros, of 2^-10 and of 2^6, and rows with one number far above the others.

    Each row is judged by its own size.
    """
    layer = layer_of(subject, case)
    decision = layer.arrivals[0]
    plain = draw_rows(sum(USUAL_COUNTS), case.hidden, torch.float32, seed=7)
    plain[0] = 0.0
    plain[1] *= 2.0**-10
    plain[2] *= 2.0**6
    plain[3, 5] = 30.0
    tokens = draw_tokens(
        USUAL_COUNTS, case.hidden, case.dtype, decision.format, plain=plain.to(case.dtype)
    )
    if case.w13.static_input:
        raise NotAskedError("a static scale fits usual rows alone")
    found, expected = layer.found(subject, tokens), layer.expected(subject, tokens)
    if not bool(found.isfinite().all()):
        bad = (~found.isfinite()).any(dim=1).nonzero().flatten().tolist()
        raise FaultError(
            f"{case.subject}: scale extremes give results that are not finite, rows {bad}\n"
            f"case: {case}; row 0 is zeros, row 1 tiny, row 2 large"
        )
    tolerance = case.tolerance(len(expected))
    return require_close(
        found, expected, tolerance, subject=case.subject, case=f"{case}, extreme rows"
    )


def experts_read_no_undefined_row(subject: Subject, case: ExpertCase) -> None:
    """Whatever lies past the last group, and in gaps, changes no bit of a defined row."""
    layer = layer_of(subject, case)
    for decision in layer.arrivals:
        poisoned = draw_tokens(USUAL_COUNTS, case.hidden, case.dtype, decision.format)
        clean = replace(
            poisoned,
            rows=_cleaned(poisoned.rows, defined_rows(poisoned)),
            scales=None
            if poisoned.scales is None
            else _cleaned(poisoned.scales, defined_rows(poisoned)),
        )
        one, other = layer.found(subject, poisoned), layer.found(subject, clean)
        if not same_bytes(one, other):
            raise FaultError(
                f"{HOOK} reads past the last group: results change with rows that belong to none\n"
                f"case: {case}, {_said(decision)}"
            )


def _cleaned(tensor: torch.Tensor, defined: torch.Tensor) -> torch.Tensor:
    copy = tensor.clone()
    copy.unsqueeze(-1).view(torch.uint8)[~defined] = 0
    return copy


def experts_answer_in_the_dtype_asked_for(subject: Subject, case: ExpertCase) -> None:
    """The result has the layout of the rows, the dtype that was asked for, and lies on the device
    of the capabilities.
    """
    layer = layer_of(subject, case)
    for decision in layer.arrivals:
        tokens = draw_tokens(USUAL_COUNTS, case.hidden, case.dtype, decision.format)
        shape = (*tokens.rows.shape[:-1], case.hidden)
        for dtype in (torch.float32, torch.bfloat16):
            found = subject.ops.quantized_moe_apply(subject.there(tokens), layer.own, dtype)
            what = f"{HOOK} with out_dtype {dtype}: its result"
            require_shape(found, shape, dtype, subject.capabilities.device, what)


def experts_leave_their_arguments_alone(subject: Subject, case: ExpertCase) -> None:
    """No argument is written to, and the result shares no memory with one."""
    layer = layer_of(subject, case)
    for decision in layer.arrivals:
        for counts in (USUAL_COUNTS, COUNTS["one row"]):
            tokens = subject.there(draw_tokens(counts, case.hidden, case.dtype, decision.format))
            before = Untouched(tokens=tokens, experts=layer.own)
            found = subject.ops.quantized_moe_apply(tokens, layer.own, case.dtype)
            before.require(HOOK, f"{case}, {_said(decision)}")
            before.require_apart(found, HOOK, f"{case}, {_said(decision)}")


def experts_repeat_themselves(subject: Subject, case: ExpertCase) -> None:
    """The same call gives the same bits, also when another layer ran in between."""
    layer, other = layer_of(subject, case), layer_of(subject, case, seed=11)
    tokens = draw_tokens(USUAL_COUNTS, case.hidden, case.dtype, layer.arrivals[0].format)
    first = layer.found(subject, tokens)
    require_same(first, layer.found(subject, tokens), f"{HOOK} does not repeat itself ({case})")
    other.found(subject, tokens)
    again = layer.found(subject, tokens)
    require_same(
        first, again, f"{HOOK} keeps something from the layer that ran in between ({case})"
    )


def experts_multiply_by_routing_weights_where_asked(subject: Subject, case: ExpertCase) -> Measured:
    """Results are multiplied by routing weights where the record says that the experts do it."""
    layer = layer_of(subject, case)
    tokens = draw_tokens(USUAL_COUNTS, case.hidden, case.dtype, layer.arrivals[0].format)
    weights = 0.25 + torch.rand(tokens.rows.shape[:-1], generator=torch.Generator().manual_seed(3))
    weighted = replace(tokens, routing_weight_side=RoutingWeightSide.EXPERTS, row_weights=weights)
    return _compared(subject, layer, weighted, "the experts multiply by routing weights")


def preparing_experts_is_idempotent(subject: Subject, case: ExpertCase) -> None:
    """Preparing prepared experts changes no result."""
    layer = layer_of(subject, case)
    decision = layer.arrivals[0]
    tokens = draw_tokens(USUAL_COUNTS, case.hidden, case.dtype, decision.format)
    once = layer.found(subject, tokens)
    twice = replace(layer, own=subject.ops.prepare_expert_weights(layer.own, decision))
    require_same(
        once,
        twice.found(subject, tokens),
        f"prepare_expert_weights is not idempotent: results change ({case})",
    )


def experts_are_prepared_again_after_a_weight_update(subject: Subject, case: ExpertCase) -> None:
    """Preparing a record whose stored tensors were replaced serves the new weights.

    The record is as a weight update leaves it: new tensors beside what was prepared of the old.
    """
    layer, new = layer_of(subject, case), layer_of(subject, case, seed=23)
    decision = layer.arrivals[0]
    tokens = draw_tokens(USUAL_COUNTS, case.hidden, case.dtype, decision.format)
    fresh = prepared(subject, replace(new.stored, prepared=None), decision)
    stored = subject.there(new.stored)
    updated = subject.ops.prepare_expert_weights(
        replace(layer.own, w13=stored.w13, w2=stored.w2), decision
    )
    expected = replace(layer, own=fresh).found(subject, tokens)
    found = replace(layer, own=updated).found(subject, tokens)
    if same_bytes(found, layer.found(subject, tokens)):
        raise FaultError(
            f"prepare_expert_weights keeps the old weights after a weight update\ncase: {case}"
        )
    require_same(
        expected, found, f"prepare_expert_weights after a weight update: other results ({case})"
    )


def mismatched_rows_are_refused(subject: Subject, case: ExpertCase) -> None:
    """Rows that are not what their format says, or that the experts cannot multiply, raise."""
    layer = layer_of(subject, case)
    tokens = draw_tokens(USUAL_COUNTS, case.hidden, case.dtype, layer.arrivals[0].format)
    wrong = {"their format names another dtype": _renamed(tokens)}
    is_quantised = tokens.scales is not None
    if is_quantised:
        wrong["their scales are missing"] = replace(tokens, scales=None)
    else:
        wrong["scales came that nobody asked for"] = replace(
            tokens, scales=torch.ones(tokens.rows.shape[:-1])
        )
    for what, bad in wrong.items():
        try:
            subject.ops.quantized_moe_apply(subject.there(bad), layer.own, case.dtype)
        except MortiseError:
            continue
        raise FaultError(
            f"{HOOK} took rows although {what}: numbers nobody can trust\ncase: {case}"
        )


def _renamed(tokens: DispatchedTokens) -> DispatchedTokens:
    is_int8 = tokens.format.dtype is DispatchDtype.INT8
    other = replace(
        tokens.format,
        dtype=DispatchDtype.FP32 if is_int8 else DispatchDtype.INT8,
        scale_layout=ScaleLayout.NONE if is_int8 else ScaleLayout.PER_TOKEN,
    )
    return replace(tokens, format=other)


def claimed_schemes_are_served(subject: Subject) -> None:
    """Every scheme of the capabilities is served for some layer, and no other one is."""
    capabilities = subject.capabilities
    for scheme in WeightScheme:
        everything = replace(capabilities, schemes=frozenset({scheme}))
        answers = [subject.ops.supports(case.request) for case in layers(everything)]
        if silent := [answer for answer in answers if not answer.ok and not answer.reason]:
            raise FaultError(f"supports() says no to {scheme.value} without a reason: {silent[0]}")
        served = any(answer.ok for answer in answers)
        if served and scheme not in capabilities.schemes:
            raise FaultError(
                f"supports() serves {scheme.value}, which capabilities() does not list"
            )
        if not served and scheme in capabilities.schemes:
            raise FaultError(
                f"capabilities() lists {scheme.value}, and supports() refuses every layer of it,"
                f" for example: {answers[0].reason}"
            )


def _check(run: object, cases: object = plain_layers) -> Check:
    return Check(run=run, level=Level.DEVICE, hook=HOOK, cases=cases)  # type: ignore[arg-type]


CHECKS: Final = (
    Check(run=claimed_schemes_are_served, level=Level.HOST, hook=HOOK),
    _check(experts_match_the_reference, layers),
    _check(experts_take_every_group_list),
    _check(experts_take_extreme_rows),
    _check(experts_read_no_undefined_row),
    _check(experts_answer_in_the_dtype_asked_for),
    _check(experts_leave_their_arguments_alone),
    _check(experts_repeat_themselves),
    _check(experts_multiply_by_routing_weights_where_asked),
    _check(preparing_experts_is_idempotent),
    _check(experts_are_prepared_again_after_a_weight_update),
    _check(mismatched_rows_are_refused),
)
