"""Projections outside the experts in every claimed scheme, against the reference."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import torch

from mortise.conformance.comparison import (
    Untouched,
    require_close,
    require_same,
    require_shape,
    same_bytes,
)
from mortise.conformance.draws import FORMS, Form, draw_rows, draw_weight
from mortise.conformance.records import Check, FaultError, Level, Measured, NotAskedError, worst
from mortise.conformance.tolerances import Tolerance, of_projection
from mortise.conformance.what_if import missing_tokens, wrong_projection
from mortise.plugin import LinearLayerRequest, LinearWeight, ModelRole, WeightScheme

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mortise.conformance.subject import Subject
    from mortise.plugin import Capabilities, StoredWeight

HOOK: Final = "quantized_linear"
LAYER: Final = "model.layers.3.self_attn.q_b_proj"
NUMBERS_OF_ROWS: Final = (0, 1, 5, 33)


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearCase:
    """One projection.

    Args:
        form: how its weight is stored.
        dtype: compute dtype.
        out_features, in_features: N and K.
        num_parts: projections that were fused along N.
        has_bias: it adds a bias.
    """

    form: Form
    dtype: torch.dtype
    out_features: int = 128
    in_features: int = 256
    num_parts: int = 1
    has_bias: bool = False

    def __str__(self) -> str:
        said = [f"{self.form}", f"{self.out_features}x{self.in_features}", str(self.dtype)[6:]]
        return "-".join([*said, *(["bias"] if self.has_bias else [])])

    @property
    def subject(self) -> str:
        """Hook and scheme."""
        return f"{HOOK} of {self.form.scheme.value}"

    @property
    def request(self) -> LinearLayerRequest:
        """What ``supports_linear`` is asked."""
        return LinearLayerRequest(
            role=ModelRole.MAIN,
            layer=LAYER,
            scheme=self.form.scheme,
            out_features=self.out_features,
            in_features=self.in_features,
            num_groups=self.form.num_groups(self.in_features),
            static_input=self.form.static_input,
            compute_dtype=self.dtype,
        )

    def weight(self, seed: int = 0) -> LinearWeight:
        """Stored on the CPU, unprepared."""
        bias = draw_rows(1, self.out_features, self.dtype, seed=seed + 1)[0]
        return LinearWeight(
            layer=LAYER,
            stored=draw_weight(
                self.form,
                self.out_features,
                self.in_features,
                part_sizes=tuple(float(part + 1) for part in range(self.num_parts)),
                seed=seed,
                float_dtype=self.dtype,
            ),
            bias=bias if self.has_bias else None,
            out_features=self.out_features,
            in_features=self.in_features,
        )

    def tolerance(self, rows: int) -> Tolerance:
        """How far so many rows may be off."""
        return of_projection(
            self.form.scheme,
            self.dtype,
            self.in_features,
            rows,
            static_input=self.form.static_input,
        )


def projections(capabilities: Capabilities) -> Iterator[LinearCase]:
    """Every form of every claimed scheme; with a bias, fused, and of sizes that fill no tile."""
    for one in plain_projections(capabilities):
        for form in FORMS[one.form.scheme]:
            yield replace(one, form=form)
        yield replace(one, out_features=72, in_features=160)
        yield replace(one, out_features=160, num_parts=2, has_bias=True)


def plain_projections(capabilities: Capabilities) -> Iterator[LinearCase]:
    """The plainest form of every claimed scheme, in each compute dtype."""
    for dtype in capabilities.compute_dtypes:
        for scheme in WeightScheme:
            # Unquantised projections are plain torch and never come to the hook.
            if scheme in capabilities.schemes and scheme is not WeightScheme.FLOAT:
                yield LinearCase(form=FORMS[scheme][0], dtype=dtype)


@dataclass(frozen=True, slots=True)
class Projection:
    """A projection as a backend and the reference prepared it."""

    case: LinearCase
    own: LinearWeight
    stored: LinearWeight

    def found(self, subject: Subject, rows: torch.Tensor) -> torch.Tensor:
        """Of the backend, on the CPU."""
        case = self.case
        found = subject.ops.quantized_linear(subject.there(rows), self.own, case.dtype)
        shape = (len(rows), case.out_features)
        what = f"{HOOK}: its result"
        return require_shape(
            found, shape, case.dtype, subject.capabilities.device, f"{what} (case: {case})"
        ).cpu()

    def expected(self, subject: Subject, rows: torch.Tensor) -> torch.Tensor:
        """Of the reference."""
        return subject.reference.quantized_linear(rows, self.stored, self.case.dtype)


def projection_of(subject: Subject, case: LinearCase, seed: int = 0) -> Projection:
    """Prepare a projection.

    Raises:
        NotAskedError: the backend says that it does not serve it.
    """
    support = subject.ops.supports_linear(case.request)
    if not support.ok:
        raise NotAskedError(f"supports_linear() says no: {support.reason}")
    own = subject.ops.prepare_linear_weight(subject.there(case.weight(seed)))
    return Projection(case, own, case.weight(seed))


def _compared(subject: Subject, one: Projection, rows: torch.Tensor, what: str) -> Measured:
    found, expected = one.found(subject, rows), one.expected(subject, rows)
    tolerance = one.case.tolerance(len(rows))

    def multiply(stored: StoredWeight) -> torch.Tensor:
        changed = replace(one.stored, stored=stored)
        return subject.reference.quantized_linear(rows, changed, one.case.dtype)

    def explain() -> str:
        missing = missing_tokens(found, expected, [len(rows) - 1], tolerance)
        return missing or wrong_projection(one.stored.stored, found, multiply, tolerance)

    return require_close(
        found,
        expected,
        tolerance,
        subject=one.case.subject,
        case=f"{one.case}, {what}",
        explain=explain,
    )


def projections_match_the_reference(subject: Subject, case: LinearCase) -> Measured:
    """Projections give what the reference gives, for no row, one row and more, with their bias."""
    one = projection_of(subject, case)
    measured = [
        _compared(subject, one, draw_rows(n, case.in_features, case.dtype, seed=n), f"{n} rows")
        for n in NUMBERS_OF_ROWS
    ]
    return worst(measured)


def projections_take_rows_that_are_not_contiguous(subject: Subject, case: LinearCase) -> None:
    """A slice of wider rows gives the bits that a copy of it gives."""
    one = projection_of(subject, case)
    wide = draw_rows(6, 2 * case.in_features, case.dtype, seed=3)
    part = subject.there(wide)[:, case.in_features :]
    found = subject.ops.quantized_linear(part, one.own, case.dtype).cpu()
    copied = one.found(subject, wide[:, case.in_features :].contiguous())
    require_same(copied, found, f"{HOOK} reads rows that are not contiguous wrongly ({case})")


def projections_answer_in_the_dtype_asked_for(subject: Subject, case: LinearCase) -> None:
    """The result is ``[T, N]`` of the dtype that was asked for, on the capabilities' device."""
    one = projection_of(subject, case)
    rows = subject.there(draw_rows(3, case.in_features, case.dtype))
    for dtype in (torch.float32, torch.bfloat16):
        found = subject.ops.quantized_linear(rows, one.own, dtype)
        what = f"{HOOK} with out_dtype {dtype}: its result"
        require_shape(found, (3, case.out_features), dtype, subject.capabilities.device, what)


def projections_leave_their_arguments_alone(subject: Subject, case: LinearCase) -> None:
    """No argument is written to, and the result shares no memory with one."""
    one = projection_of(subject, case)
    rows = subject.there(draw_rows(3, case.in_features, case.dtype))
    before = Untouched(rows=rows, linear=one.own)
    found = subject.ops.quantized_linear(rows, one.own, case.dtype)
    before.require(HOOK, case)
    before.require_apart(found, HOOK, case)


def projections_repeat_themselves(subject: Subject, case: LinearCase) -> None:
    """The same call gives the same bits, also when another projection ran in between."""
    one, other = projection_of(subject, case), projection_of(subject, case, seed=11)
    rows = draw_rows(5, case.in_features, case.dtype)
    first = one.found(subject, rows)
    other.found(subject, rows)
    what = f"{HOOK} keeps something from the projection that ran in between ({case})"
    require_same(first, one.found(subject, rows), what)


def projections_treat_each_row_alone(subject: Subject, case: LinearCase) -> Measured:
    """A row gives the same beside others, in another order, and in a batch of its own."""
    one = projection_of(subject, case)
    rows = draw_rows(7, case.in_features, case.dtype, seed=5)
    order = torch.tensor([3, 0, 6, 1, 5, 2, 4])
    together = one.found(subject, rows)
    parts = torch.cat([one.found(subject, rows[:3]), one.found(subject, rows[3:])])
    tolerance = case.tolerance(len(rows))
    permuted = one.found(subject, rows[order])
    return worst(
        (
            require_close(
                found, together[places], tolerance, subject=case.subject, case=f"{case}, {what}"
            )
            for found, places, what in (
                (permuted, order, "rows in another order give other results"),
                (parts, torch.arange(7), "two batches give other results than one"),
            )
        )
    )


def preparing_a_projection_is_idempotent(subject: Subject, case: LinearCase) -> None:
    """Preparing a prepared projection changes no result."""
    one = projection_of(subject, case)
    rows = draw_rows(5, case.in_features, case.dtype)
    twice = replace(one, own=subject.ops.prepare_linear_weight(one.own))
    require_same(
        one.found(subject, rows),
        twice.found(subject, rows),
        f"prepare_linear_weight is not idempotent: results change ({case})",
    )


def projections_are_prepared_again_after_a_weight_update(
    subject: Subject, case: LinearCase
) -> None:
    """Preparing a record whose stored tensors were replaced serves the new weight."""
    one, new = projection_of(subject, case), projection_of(subject, case, seed=23)
    rows = draw_rows(5, case.in_features, case.dtype)
    stored = subject.there(new.stored.stored)
    updated = subject.ops.prepare_linear_weight(replace(one.own, stored=stored))
    found = replace(one, own=updated).found(subject, rows)
    if same_bytes(found, one.found(subject, rows)):
        raise FaultError(
            f"prepare_linear_weight keeps the old weight after a weight update\ncase: {case}"
        )
    what = f"prepare_linear_weight after a weight update: other results ({case})"
    require_same(new.found(subject, rows), found, what)


def claimed_schemes_of_projections_are_served(subject: Subject) -> None:
    """Whatever supports_linear() refuses has a reason, and no unclaimed scheme is served."""
    for scheme in WeightScheme:
        everything = replace(subject.capabilities, schemes=frozenset({scheme}))
        answers = [subject.ops.supports_linear(one.request) for one in projections(everything)]
        if any(not answer.ok and not answer.reason for answer in answers):
            raise FaultError(f"supports_linear() says no to {scheme.value} without a reason")
        if any(answer.ok for answer in answers) and scheme not in subject.capabilities.schemes:
            raise FaultError(
                f"supports_linear() serves {scheme.value}, which capabilities() does not list"
            )


def _check(run: object, cases: object = plain_projections) -> Check:
    return Check(run=run, level=Level.DEVICE, hook=HOOK, cases=cases)  # type: ignore[arg-type]


CHECKS: Final = (
    Check(run=claimed_schemes_of_projections_are_served, level=Level.HOST, hook=HOOK),
    _check(projections_match_the_reference, projections),
    _check(projections_take_rows_that_are_not_contiguous),
    _check(projections_answer_in_the_dtype_asked_for),
    _check(projections_leave_their_arguments_alone),
    _check(projections_repeat_themselves),
    _check(projections_treat_each_row_alone),
    _check(preparing_a_projection_is_idempotent),
    _check(projections_are_prepared_again_after_a_weight_update),
)
