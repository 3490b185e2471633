"""What became of one call when another backend was asked it, and of all of them together."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch

    from mortise.recording.allowances import Allowance
    from mortise.recording.differences import Difference
    from mortise.recording.documents import Call


class Verdict(StrEnum):
    """How a replayed answer stands to the recorded one, the worst first."""

    DIVERGENT = "divergent"
    """Further off than roundings explain, or no answer at all."""
    UNSUPPORTED = "unsupported"
    """The backend says that it does not serve this."""
    DIFFERS = "differs"
    """Another decision, which a backend is free to take."""
    WITHIN = "within"
    """Not the same numbers, and no further off than roundings explain."""
    SAME = "same"
    """The same to the bit."""
    NOT_COMPARED = "not compared"
    """Only its owner can read the answer; what is made of it is compared."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One call.

    Args:
        call: as it was recorded.
        verdict: how the answer stands to the recorded one.
        note: why, or under which circumstances.
        difference: of the two answers, where both are tensors.
        allowance: how large that may be.
        answers: the tensors that were compared: recorded and replayed, by name; only of a call
            that was replayed alone.
    """

    call: Call
    verdict: Verdict
    note: str = ""
    difference: Difference | None = None
    allowance: Allowance | None = None
    answers: tuple[tuple[str, torch.Tensor, torch.Tensor], ...] = field(default=(), repr=False)

    @property
    def is_measured(self) -> bool:
        """Whether numbers were compared."""
        return self.difference is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """All calls of one hook, layer and role.

    Args:
        hook, layer, role: of the calls.
        calls: how many.
        verdict: the worst.
        worst: the call that decides, by its error in relation to what is allowed.
        notes: what was said of them, each once.
    """

    hook: str
    layer: str
    role: str
    calls: int
    verdict: Verdict
    worst: Outcome
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Every call of a recording, in order.

    Args:
        outcomes: one a call.
        backend: who was asked.
    """

    outcomes: tuple[Outcome, ...]
    backend: str

    @property
    def first_divergent(self) -> Outcome | None:
        """The first call whose answer is further off than roundings explain."""
        return next((one for one in self.outcomes if one.verdict is Verdict.DIVERGENT), None)

    @property
    def num_measured(self) -> int:
        """Calls whose numbers were compared."""
        return sum(one.is_measured for one in self.outcomes)

    @property
    def is_clean(self) -> bool:
        """Whether something was compared and nothing diverges."""
        return self.num_measured > 0 and self.first_divergent is None

    def summaries(self) -> tuple[Summary, ...]:
        """By role, hook and layer, in the order in which they were first called."""
        groups: dict[tuple[str, str, str], list[Outcome]] = {}
        for one in self.outcomes:
            groups.setdefault((one.call.role, one.call.hook, one.call.layer), []).append(one)
        return tuple(_summary(group) for group in groups.values())


def _summary(group: list[Outcome]) -> Summary:
    order = list(Verdict)
    worst = min(group, key=lambda one: (order.index(one.verdict), -_share(one)))
    return Summary(
        hook=worst.call.hook,
        layer=worst.call.layer,
        role=worst.call.role,
        calls=len(group),
        verdict=worst.verdict,
        worst=worst,
        notes=_notes(group),
    )


def _share(one: Outcome) -> float:
    """How much of what is allowed an error takes."""
    if one.difference is None or one.allowance is None or not one.difference.whole:
        return 0.0
    return one.difference.whole / max(one.allowance.whole, 1e-300)


def _notes(group: Iterable[Outcome]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(one.note for one in group if one.note))


def sentence(report: Report) -> str:
    """What a report comes to, in one sentence."""
    first = report.first_divergent
    if first is not None:
        call = first.call
        return f"the first divergent call is {call.number}: {call.hook}{_where(call)}: {first.note}"
    if not report.num_measured:
        return "nothing was compared: no call of the recording could be asked of this backend"
    measured = f"{report.num_measured} of {len(report.outcomes)} calls were compared"
    unsupported = {
        (one.call.role, one.call.layer)
        for one in report.outcomes
        if one.verdict is Verdict.UNSUPPORTED
    }
    beside = f"; {len(unsupported)} layers are not served" if unsupported else ""
    return f"no call diverges ({measured}{beside})"


def _where(call: Call) -> str:
    mode = f" ({call.mode})" if call.mode else ""
    layer = f" of layer {call.layer}" if call.layer else ""
    made_in = f"pass {call.forward_pass}{mode}" if call.forward_pass else "loading"
    return f"{layer}, role {call.role}, {made_in}"
