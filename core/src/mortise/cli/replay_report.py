"""A replay as its reader sees it: a row for each hook and layer, and one sentence."""

from __future__ import annotations

from math import isfinite
from typing import TYPE_CHECKING, Any

from mortise.cli.output import results, table
from mortise.recording.outcome import Verdict, sentence

if TYPE_CHECKING:
    from mortise.recording.allowances import Allowance
    from mortise.recording.differences import Difference
    from mortise.recording.documents import Call
    from mortise.recording.outcome import Outcome, Report, Summary
    from mortise.recording.reader import Recording

COLUMNS = ("role", "hook", "layer", "calls", "error", "allowed", "verdict", "")


def show_report(recording: Recording, report: Report) -> None:
    """Print it to standard output."""
    console = results()
    for line in who(recording, report):
        console.print(line, markup=False)
    shown = [_row(one) for one in report.summaries() if _is_shown(one)]
    if shown:
        console.print(table(COLUMNS, shown))
    console.print(sentence(report), markup=False, soft_wrap=True)


def who(recording: Recording, report: Report) -> list[str]:
    """Who answered first, and who was asked again."""
    lines = []
    for role, one in recording.header.backends.items():
        emulated = ", emulated" if one.emulated else ""
        of_role = f" ({role})" if len(recording.header.backends) > 1 else ""
        lines.append(
            f"recorded{of_role}: {one.name} ({one.distribution} {one.version}{emulated})"
            f" on {one.device}"
        )
    return [*dict.fromkeys(lines), f"replayed: {report.backend}"]


def _is_shown(one: Summary) -> bool:
    """What was asked only so that something else could be compared is not."""
    is_question = one.hook.startswith("supports") and one.verdict is Verdict.SAME
    return one.verdict is not Verdict.NOT_COMPARED and not is_question


def _row(one: Summary) -> tuple[str, ...]:
    found, allowed = one.worst.difference, one.worst.allowance
    return (
        one.role,
        one.hook,
        one.layer,
        str(one.calls),
        "" if found is None else f"{found.whole:.2g}",
        "" if allowed is None else f"{allowed.whole:.2g}",
        one.verdict.value,
        one.worst.note,
    )


def report_fields(recording: Recording, report: Report) -> dict[str, Any]:
    """The document of ``replay --json`` and ``diff --json``."""
    first = report.first_divergent
    return {
        "recorded": {role: one.model_dump() for role, one in recording.header.backends.items()},
        "replayed": report.backend,
        "model": recording.header.model,
        "dtype": recording.header.dtype,
        "calls": len(report.outcomes),
        "compared": report.num_measured,
        "clean": report.is_clean,
        "first_divergent": None if first is None else outcome_fields(first),
        "summaries": [_summary_fields(one) for one in report.summaries()],
        "sentence": sentence(report),
    }


def _summary_fields(one: Summary) -> dict[str, Any]:
    return {
        "role": one.role,
        "hook": one.hook,
        "layer": one.layer,
        "calls": one.calls,
        "verdict": one.verdict.value,
        "worst_call": one.worst.call.number,
        **_measures(one.worst.difference, one.worst.allowance),
        "notes": list(one.notes),
    }


def outcome_fields(one: Outcome) -> dict[str, Any]:
    """One call."""
    return {
        **call_fields(one.call),
        "verdict": one.verdict.value,
        "note": one.note,
        **_measures(one.difference, one.allowance),
    }


def call_fields(call: Call) -> dict[str, Any]:
    """Which call it is."""
    return {
        "call": call.number,
        "hook": call.hook,
        "layer": call.layer,
        "role": call.role,
        "pass": call.forward_pass,
        "mode": call.mode,
    }


def _measures(found: Difference | None, allowed: Allowance | None) -> dict[str, Any]:
    if found is None or allowed is None:
        return {"error": None, "allowed": None}
    numbers = {
        "error": found.whole,
        "allowed": allowed.whole,
        "row_error": found.row,
        "row_allowed": allowed.row,
        "gain": found.gain,
        "max_abs": found.max_abs,
        "recorded": found.recorded,
        "replayed": found.replayed,
    }
    # JSON has no word for what is not finite.
    return {
        **{name: number if isfinite(number) else None for name, number in numbers.items()},
        "worst_row": found.worst_row,
        "worst_element": list(found.worst),
        "ulps": found.ulps,
    }
