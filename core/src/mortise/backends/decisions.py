"""Decisions as records: what was decided, by which rule, for what reason, from which input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from mortise.spec.roles import ModelRole


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """One decision and its reason; printable, and the same wherever it is printed.

    Args:
        role: the model it holds for; None: for the whole run.
        subject: what it is about: ``backend``, the name of a hook, the dotted name of a layer.
        value: what was decided.
        rule: which rule decided, a short stable word (``named``, ``fallback``, ``override``).
        reason: why, in words.
        source: where the input came from: a file, an option, a distribution.
    """

    role: ModelRole | None
    subject: str
    value: str
    rule: str
    reason: str
    source: str = ""


class DecisionLog:
    """Collects the decisions of one run in the order in which they were taken.

    Whoever builds something makes a log, hands it to the parts and keeps it; none is global.
    """

    __slots__ = ("_decisions",)

    def __init__(self, decisions: Iterable[Decision] = ()) -> None:
        self._decisions = list(decisions)

    def add(self, decision: Decision) -> None:
        """Remember one decision."""
        self._decisions.append(decision)

    def extend(self, decisions: Iterable[Decision]) -> None:
        """Remember several, in their order."""
        self._decisions.extend(decisions)

    def about(self, subject: str) -> tuple[Decision, ...]:
        """The decisions about one hook or layer."""
        return tuple(decision for decision in self._decisions if decision.subject == subject)

    def __iter__(self) -> Iterator[Decision]:
        return iter(tuple(self._decisions))

    def __len__(self) -> int:
        return len(self._decisions)
