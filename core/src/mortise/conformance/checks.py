"""Every check of the kit, in the order in which they are asked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from mortise.conformance import (
    dispatcher_checks,
    expert_checks,
    host_checks,
    indexer_checks,
    layer_checks,
    linear_checks,
    policy_checks,
    split_checks,
    static_checks,
)
from mortise.conformance.records import Check, Item, Level
from mortise.plugin import ExpertLayerRequest, LinearLayerRequest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mortise.conformance.subject import Subject

CHECKS: Final[tuple[Check, ...]] = (
    *static_checks.CHECKS,
    *host_checks.CHECKS,
    *policy_checks.CHECKS,
    *expert_checks.CHECKS,
    *layer_checks.CHECKS,
    *linear_checks.CHECKS,
    *dispatcher_checks.CHECKS,
    *indexer_checks.CHECKS,
    *split_checks.CHECKS,
)


def items(subject: Subject, level: Level) -> Iterator[Item]:
    """The checks of one level with the cases that the backend's declarations ask for.

    A check that does not apply is one item, whose run says why.
    """
    for check in CHECKS:
        if check.level is level:
            yield from _items_of(subject, check)


def _items_of(subject: Subject, check: Check) -> Iterator[Item]:
    cases = None if check.cases is None else _cases(subject, check)
    if not cases:
        yield Item(check=check)
        return
    for case in cases:
        yield Item(check=check, case=case)


def _cases(subject: Subject, check: Check) -> list[object]:
    """Those that it serves, and the first that it does not, whose run says why."""
    assert check.cases is not None
    served: list[object] = []
    refused: list[object] = []
    try:
        if check.hook is not None:
            subject.require_hook(check.hook)
        for case in check.cases(subject.capabilities):
            (served if _is_served(subject, case) else refused).append(case)
    # Whatever is wrong, another check says so; this one says that it was not asked.
    except Exception:
        return []
    return [*served, *refused[:1]]


def _is_served(subject: Subject, case: object) -> bool:
    request = getattr(case, "request", None)
    if isinstance(request, ExpertLayerRequest):
        return subject.ops.supports(request).ok
    if isinstance(request, LinearLayerRequest):
        return subject.ops.supports_linear(request).ok
    return True
