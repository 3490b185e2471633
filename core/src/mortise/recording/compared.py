"""The answer of each hook beside the recorded one, where and how the two can be compared."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import torch

from mortise.recording import allowances
from mortise.recording.asked import NotServedError
from mortise.recording.differences import common_gain, difference
from mortise.recording.guesses import guess
from mortise.recording.index_keys import served_keys
from mortise.recording.outcome import Outcome, Verdict
from mortise.recording.rows import PlainRows, packed, row_places
from mortise.recording.schedules import schedule_problem
from mortise.spec.consumer import scales_in_words
from mortise.spec.dispatch import ScaleLayout
from mortise.spec.paged_mqa import IndexKeyDtype

if TYPE_CHECKING:
    from mortise.backends import Ops
    from mortise.recording.allowances import Allowance
    from mortise.recording.differences import Difference
    from mortise.recording.documents import Call
    from mortise.spec.dispatch import DispatchDecision, DispatchFormat
    from mortise.spec.experts import ExpertWeights
    from mortise.spec.paged_mqa import PagedMQAMetadata
    from mortise.spec.weights import LinearWeight


RESULT: Final = "the answer"
"""What is said of the one tensor that most hooks give."""


def judged(
    call: Call,
    name: str,
    recorded: torch.Tensor,
    replayed: torch.Tensor,
    allowance: Allowance,
    *,
    note: str = "",
    visible: torch.Tensor | None = None,
) -> Outcome:
    """Two tensors by what is allowed.

    Args:
        call: whose answers they are.
        name: what they are called where they are shown.
        recorded: the answer that was kept.
        replayed: of the same shape and dtype, if the backend keeps the contract.
        allowance: the largest difference.
        note: the circumstances.
        visible: elements that count; None counts all.
    """
    answers = ((name, recorded, replayed),)
    if replayed.shape != recorded.shape or replayed.dtype is not recorded.dtype:
        found, wanted = _described(replayed), _described(recorded)
        return _divergent(call, f"{name} is {found}, and was {wanted}", answers)
    measured = difference(replayed, recorded, visible)
    verdict, problem = _verdict(measured, allowance)
    looks = ""
    if problem:
        looks = guess(*(_seen(one, visible) for one in (recorded, replayed)))
    return Outcome(
        call=call,
        verdict=verdict,
        note="; ".join(filter(None, (problem and f"{name} {problem}", looks, note))),
        difference=measured,
        allowance=allowance,
        answers=answers,
    )


def _seen(answer: torch.Tensor, visible: torch.Tensor | None) -> torch.Tensor:
    return answer if visible is None else answer.masked_fill(~visible, 0.0)


def _verdict(found: Difference, allowance: Allowance) -> tuple[Verdict, str]:
    if found.is_none:
        return Verdict.SAME, ""
    problem = allowance.problem(found)
    return (Verdict.DIVERGENT if problem else Verdict.WITHIN), problem


def compared_data(call: Call, recorded: DispatchDecision, found: DispatchDecision) -> Outcome:
    """Two decisions; a backend is free to take another one."""
    if found == recorded:
        return Outcome(call=call, verdict=Verdict.SAME)
    if found.format == recorded.format:
        note = f"the same format for another reason: {found.reason}"
    else:
        note = f"{_format_text(found.format)} instead of {_format_text(recorded.format)}"
    return Outcome(call=call, verdict=Verdict.DIFFERS, note=note)


def compared_linear(
    call: Call, given: dict[str, Any], recorded: torch.Tensor, linear: LinearWeight, ops: Ops
) -> Outcome:
    """``quantized_linear`` on the recorded rows."""
    rows = given["rows"]
    _require_dtype(rows.dtype, ops)
    found = ops.quantized_linear(rows.to(ops.capabilities.device), linear, given["out_dtype"])
    allowance = allowances.of_projection(linear.stored, rows.dtype, rows.shape[1], rows.shape[0])
    return judged(call, RESULT, recorded, found.cpu(), allowance)


def compared_experts(
    call: Call,
    given: dict[str, Any],
    recorded: torch.Tensor,
    format: DispatchFormat,
    experts: ExpertWeights,
    ops: Ops,
) -> Outcome:
    """``quantized_moe_apply`` on the recorded rows, in the layout and format of this backend."""
    _require_dtype(given["out_dtype"], ops)
    plain, converted, note = _plain_rows(given, format)
    tokens = plain.arranged(format, ops.capabilities.device)
    found = ops.quantized_moe_apply(tokens, experts, given["out_dtype"])
    shape = (*tokens.rows.shape[:-1], experts.hidden_size)
    if tuple(found.shape) != shape:
        return _divergent(call, f"the rows are {_described(found)}, and should be {list(shape)}")
    places = row_places(plain.counts, format, tokens.rows.shape)
    rows = packed(found, places, format).cpu()
    allowance = allowances.of_experts(
        experts.w13,
        experts.w2,
        given["out_dtype"],
        hidden=experts.hidden_size,
        intermediate=experts.intermediate_size,
        rows=len(rows),
        converted=converted,
    )
    outcome = judged(call, RESULT, recorded, rows, allowance, note=note)
    if outcome.verdict is not Verdict.WITHIN:
        return outcome
    problem = _expert_problem(recorded, rows, plain.counts, allowance)
    return _divergent_measured(outcome, problem) if problem else outcome


def _plain_rows(given: dict[str, Any], format: DispatchFormat) -> tuple[PlainRows, float, str]:
    """The recorded rows in another format's numbers, the error that brought, and a note of it."""
    plain = PlainRows(
        rows=given["rows"],
        scales=given["scales"],
        row_weights=given["row_weights"],
        counts=given["counts"],
        capacity=given["capacity"],
        counts_on_host=given["counts_on_host"],
        kind=given["kind"],
    )
    recorded: DispatchFormat = given["format"]
    if same_numbers(recorded, format):
        return plain, 0.0, ""
    other = plain.converted(recorded, format)
    found, wanted = (one.floats(of) for one, of in ((other, format), (plain, recorded)))
    note = f"{_numbers_text(recorded)} were brought into {_numbers_text(format)} for it"
    return other, difference(found, wanted).whole, note


def same_numbers(one: DispatchFormat, other: DispatchFormat) -> bool:
    """Whether rows of two formats are the same bytes, but for their layout."""
    return (one.dtype, one.scale_layout, one.scale_format, one.global_scale) == (
        other.dtype,
        other.scale_layout,
        other.scale_format,
        other.global_scale,
    )


def _expert_problem(
    recorded: torch.Tensor, rows: torch.Tensor, counts: tuple[int, ...], allowance: Allowance
) -> str:
    """An expert whose rows have a factor in common that all rows together do not show."""
    parts = zip(rows.split(list(counts)), recorded.split(list(counts)), strict=True)
    for expert, (found, expected) in enumerate(parts):
        if problem := allowance.gain_problem(*common_gain(found, expected)):
            return f"what expert {expert} gives {problem}"
    return ""


def compared_plan(
    call: Call, given: dict[str, Any], recorded: dict[str, Any], found: PagedMQAMetadata, ops: Ops
) -> Outcome:
    """``paged_mqa_metadata``: what a schedule is for, and that it covers all of it exactly once."""
    lens = given["context_lens"]
    if not torch.equal(found.context_lens.cpu(), lens):
        return _divergent(call, "the context lengths of the schedule are not those it was given")
    if found.max_context_len != recorded["max_context_len"]:
        what = f"max_context_len is {found.max_context_len}, not {recorded['max_context_len']}"
        return _divergent(call, what)
    workers = ops.capabilities.num_workers
    problem = schedule_problem(found.schedule, found.planned_lens, lens, workers)
    if problem:
        return _divergent(call, problem)
    return Outcome(call=call, verdict=Verdict.SAME)


def compared_scores(
    call: Call,
    given: dict[str, Any],
    recorded: torch.Tensor,
    plan: PagedMQAMetadata,
    ops: Ops,
) -> Outcome:
    """``paged_mqa_logits`` on the recorded pages; columns that a row sees."""
    query, device = given["query"], ops.capabilities.device
    _require_dtype(query.dtype, ops)
    pages, converted, note = served_keys(given["keys"], given["scales"], query.dtype, ops)
    found = ops.paged_mqa_logits(
        query.to(device),
        pages,
        given["weights"].to(device),
        given["page_table"].to(device),
        plan,
    )
    columns = recorded.shape[1]
    if found.dim() != 2 or found.shape[0] != recorded.shape[0] or found.shape[1] < columns:
        what = f"the scores are {_described(found)}, and should have {columns} columns"
        return _divergent(call, what)
    lens = plan.context_lens.cpu().view(-1, 1)
    heads, dim = query.shape[2:]
    # Whoever scores float8 keys may round queries too, on either side.
    is_exact = pages.scales is None and given["scales"] is None
    allowance = allowances.of_scores(
        IndexKeyDtype.COMPUTE if is_exact else IndexKeyDtype.FP8_E4M3,
        query.dtype,
        heads=heads,
        dim=dim,
        converted=converted,
    )
    return judged(
        call,
        RESULT,
        recorded,
        found[:, :columns].cpu(),
        allowance,
        note=note,
        visible=torch.arange(columns) < lens,
    )


def compared_parts(
    call: Call, given: dict[str, Any], recorded: dict[str, torch.Tensor], ops: Ops
) -> Outcome:
    """``qkv_split``: four parts, each the same numbers and contiguous."""
    device = ops.capabilities.device
    found = ops.qkv_split(
        given["projected_qkvz"].to(device), given["projected_ba"].to(device), given["shape"]
    )
    parts = {name: getattr(found, name) for name in recorded}
    scattered = [name for name, part in parts.items() if not part.is_contiguous()]
    if scattered:
        return _divergent(call, f"{', '.join(scattered)} is not contiguous")
    outcomes = [
        judged(call, name, recorded[name], part.cpu(), allowances.EXACT)
        for name, part in parts.items()
    ]
    order = list(Verdict)
    return min(outcomes, key=lambda one: order.index(one.verdict))


def _require_dtype(dtype: torch.dtype, ops: Ops) -> None:
    if dtype not in ops.capabilities.compute_dtypes:
        raise NotServedError(f"not served: it does not compute in {dtype}")


def _divergent(
    call: Call, note: str, answers: tuple[tuple[str, torch.Tensor, torch.Tensor], ...] = ()
) -> Outcome:
    return Outcome(call=call, verdict=Verdict.DIVERGENT, note=note, answers=answers)


def _divergent_measured(outcome: Outcome, problem: str) -> Outcome:
    note = "; ".join(filter(None, (problem, outcome.note)))
    return replace(outcome, verdict=Verdict.DIVERGENT, note=note)


def _described(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _numbers_text(format: DispatchFormat) -> str:
    scales = scales_in_words(format.scale_layout, format.scale_format)
    is_plain = format.scale_layout is ScaleLayout.NONE
    return f"{format.dtype.value} rows" + ("" if is_plain else f" (scales {scales})")


def _format_text(format: DispatchFormat) -> str:
    return f"{format.dtype.value} rows, {format.row_layout.value}"
