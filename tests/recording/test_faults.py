"""Whatever hook of a backend goes wrong, the replay names it and no other."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mortise.errors import ContractError
from mortise.plugin import Support
from mortise.recording.outcome import Verdict, sentence
from mortise.recording.schedules import schedule_problem
from mortise.reference.attention import plan_schedule
from mortise.spec.dispatch import DispatchDtype
from mortise.spec.reasons import ReasonCode
from tests.engine.test_independent_models import quantised
from tests.fixtures.planted_faults import swapped_parts
from tests.fixtures.recorded_runs import recorded, replayed
from tests.fixtures.tiny_models import save_tiny

if TYPE_CHECKING:
    from pathlib import Path

    from mortise.backends import Ops
    from mortise.recording.outcome import Outcome
    from mortise.recording.reader import Recording

LAYER = "model.layers.2.mlp"


@pytest.fixture(scope="module")
def run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Recording:
    return recorded(tiny_model, tmp_path_factory.mktemp("run") / "recording", max_tokens=2)


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Recording:
    folder = tmp_path_factory.mktemp("hybrid")
    model = save_tiny(folder / "model", model_type="qwen3_next")
    return recorded(model, folder / "recording", max_tokens=1)


def only_fault(recording: Recording, fault: Any, hook: str, layer: str) -> Outcome:
    report = replayed(recording, fault=fault)
    divergent = [one for one in report.outcomes if one.verdict is Verdict.DIVERGENT]
    assert {(one.call.hook, one.call.layer) for one in divergent} == {(hook, layer)}
    assert report.first_divergent is divergent[0]
    assert not report.is_clean
    return divergent[0]


class Exchange:
    """A dispatcher with something done to what it sends and to what it brings back."""

    def __init__(self, dispatcher: Any, sent: Any = None, brought: Any = None) -> None:
        self.dispatcher, self.sent, self.brought = dispatcher, sent, brought

    def dispatch(self, *arguments: Any) -> Any:
        tokens, handle = self.dispatcher.dispatch(*arguments)
        return (tokens if self.sent is None else self.sent(tokens)), handle

    def combine(self, *arguments: Any) -> Any:
        sums = self.dispatcher.combine(*arguments)
        return sums if self.brought is None else self.brought(sums)


def with_exchange(ops: Ops, **changes: Any) -> Ops:
    def create(request: Any) -> Any:
        made = ops.create_token_dispatcher(request)
        return Exchange(made, **changes) if request.layer == LAYER else made

    return replace(ops, create_token_dispatcher=create)


def changed(rows: torch.Tensor, place: int) -> torch.Tensor:
    rows = rows.clone()
    rows[place] = -rows[place]
    return rows


def test_a_row_that_is_sent_wrong(run: Recording) -> None:
    def sent(tokens: Any) -> Any:
        return replace(tokens, rows=changed(tokens.rows, 1))

    found = only_fault(run, partial(with_exchange, sent=sent), "dispatch", LAYER)
    assert found.difference is not None
    assert found.difference.worst_row == 1


def test_rows_of_a_group_in_another_order_are_right(run: Recording) -> None:
    """The contract orders groups, and no rows within one."""

    def reorder(tokens: Any) -> Any:
        start, order = 0, torch.arange(len(tokens.rows))
        for count in tokens.group_counts:
            order[start : start + count] = order[start : start + count].flip(0)
            start += count
        return replace(tokens, rows=tokens.rows[order])

    def with_reordering(ops: Ops) -> Ops:
        return with_exchange(ops, sent=reorder)

    report = replayed(run, fault=with_reordering)
    of_dispatch = [one for one in report.outcomes if one.call.hook == "dispatch"]
    assert {one.verdict for one in of_dispatch} == {Verdict.SAME}


def test_a_token_that_is_counted_to_another_expert(run: Recording) -> None:
    def sent(tokens: Any) -> Any:
        counts = tokens.group_list.clone()
        given = int(counts.argmax())
        counts[given] -= 1
        counts[given - 1] += 1
        return replace(tokens, group_list=counts, group_counts=tuple(counts.tolist()))

    found = only_fault(run, partial(with_exchange, sent=sent), "dispatch", LAYER)
    assert found.note.startswith("rows of each expert: ")


def test_a_token_that_is_brought_back_wrong(run: Recording) -> None:
    fault = partial(with_exchange, brought=partial(changed, place=1))
    found = only_fault(run, fault, "combine", LAYER)
    assert found.difference is not None
    assert found.difference.row == pytest.approx(2.0)


def test_a_split_that_mixes_up_its_parts(hybrid: Recording) -> None:
    layers = [call.layer for call in hybrid.calls if call.hook == "qkv_split"]
    only_fault(hybrid, partial(swapped_parts, call=2), "qkv_split", layers[1])


def test_parts_that_are_not_contiguous(hybrid: Recording) -> None:
    def scattered(ops: Ops) -> Ops:
        def split(*arguments: Any) -> Any:
            parts = ops.qkv_split(*arguments)
            wide = torch.cat([parts.a, parts.a], dim=1)
            return replace(parts, a=wide[:, : parts.a.shape[1]])

        return replace(ops, qkv_split=split)

    found = replayed(hybrid, fault=scattered).first_divergent
    assert found is not None
    assert found.note == "a is not contiguous"


@given(lens=st.lists(st.integers(0, 3000), min_size=1, max_size=9), num_workers=st.integers(1, 12))
@settings(max_examples=50)
def test_every_schedule_of_the_reference_covers_everything(
    lens: list[int], num_workers: int
) -> None:
    context_lens = torch.tensor(lens, dtype=torch.int32).unsqueeze(1)
    schedule = plan_schedule(context_lens, num_workers)
    assert schedule_problem(schedule, None, context_lens, num_workers) == ""


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda schedule: schedule[-1, 0].sub_(1), "ends at [2, 0], not at [3, 0]"),
        (lambda schedule: schedule[0, 1].add_(1), "begins at [0, 1]"),
        (lambda schedule: schedule[1].copy_(schedule[2] + 1), "ends before it begins"),
        (lambda schedule: schedule[1, 0].fill_(99), "a row that is not there"),
    ],
)
def test_a_schedule_that_leaves_something_out(change: Any, said: str) -> None:
    lens = torch.tensor([[300], [700], [10]], dtype=torch.int32)
    schedule = plan_schedule(lens, 3)
    change(schedule)
    assert said in schedule_problem(schedule, None, lens, 3)


def test_lengths_that_are_not_those_that_were_given(run: Recording) -> None:
    def plant(ops: Ops) -> Ops:
        def plan(lens: torch.Tensor, *others: Any) -> Any:
            made = ops.paged_mqa_metadata(lens, *others)
            made.buffers.context_lens.add_(1)
            return made

        return replace(ops, paged_mqa_metadata=plan)

    found = replayed(run, fault=plant).first_divergent
    assert found is not None
    assert (found.call.hook, found.call.forward_pass) == ("paged_mqa_metadata", 1)


def test_a_hook_that_raises(run: Recording) -> None:
    def plant(ops: Ops) -> Ops:
        def apply(tokens: Any, experts: Any, out_dtype: Any) -> Any:
            if experts.layer == LAYER:
                raise ContractError("no such kernel", reason=ReasonCode.CONTRACT_BROKEN)
            return ops.quantized_moe_apply(tokens, experts, out_dtype)

        return replace(ops, quantized_moe_apply=apply)

    found = only_fault(run, plant, "quantized_moe_apply", LAYER)
    assert found.note == "it raised ContractError: no such kernel"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda rows: rows.float(), "float32"),
        (lambda rows: rows[:, :-1], "should be"),
        (lambda rows: rows.fill_(torch.nan), "inf"),
    ],
)
def test_an_answer_of_another_kind(run: Recording, change: Any, said: str) -> None:
    def plant(ops: Ops) -> Ops:
        def apply(tokens: Any, experts: Any, out_dtype: Any) -> Any:
            rows = ops.quantized_moe_apply(tokens, experts, out_dtype)
            return change(rows) if experts.layer == LAYER else rows

        return replace(ops, quantized_moe_apply=apply)

    assert said in only_fault(run, plant, "quantized_moe_apply", LAYER).note


def test_a_format_that_the_experts_do_not_take(run: Recording) -> None:
    def plant(ops: Ops) -> Ops:
        def resolve(request: Any) -> Any:
            decision = ops.resolve_dispatch_dtype(request)
            if request.layer != LAYER:
                return decision
            return replace(decision, format=replace(decision.format, dtype=DispatchDtype.INT8))

        return replace(ops, resolve_dispatch_dtype=resolve)

    found = replayed(run, fault=plant).first_divergent
    assert found is not None
    assert (found.call.hook, found.call.layer) == ("resolve_dispatch_dtype", LAYER)
    assert "int8, which the experts do not take" in found.note


def test_a_layer_that_is_not_served_is_no_fault(run: Recording) -> None:
    def plant(ops: Ops) -> Ops:
        def supports(request: Any) -> Support:
            if request.layer == LAYER:
                return Support(ok=False, reason="too wide")
            return ops.supports(request)

        return replace(ops, supports=supports)

    report = replayed(run, fault=plant)
    unsupported = [one for one in report.outcomes if one.verdict is Verdict.UNSUPPORTED]
    assert {(one.call.layer, one.note) for one in unsupported} == {(LAYER, "not served: too wide")}
    assert report.is_clean
    assert "1 layers are not served" in sentence(report)


def test_nothing_compared_is_not_clean(run: Recording) -> None:
    def plant(ops: Ops) -> Ops:
        def never(*_: Any) -> Support:
            return Support(ok=False, reason="out of order")

        pages = replace(ops.capabilities, page_sizes=frozenset({1}))
        return replace(ops, supports=never, supports_linear=never, capabilities=pages)

    report = replayed(run, fault=plant)
    assert report.first_divergent is None
    assert not report.is_clean
    assert sentence(report).startswith("nothing was compared")


def test_an_experts_own_factor_is_found(tiny_model: Path, tmp_path: Path) -> None:
    """One of eight experts is 2 % too large; all rows together show too little of it."""
    model = quantised(tiny_model, tmp_path / "model", "w8a8")
    recording = recorded(model, tmp_path / "recording", prompt=range(256), max_tokens=1)

    def plant(ops: Ops) -> Ops:
        def prepare(experts: Any, decision: Any) -> Any:
            if experts.layer == LAYER:
                scale = experts.w2.scale.clone()
                scale[1] *= 1.02
                experts = replace(experts, w2=replace(experts.w2, scale=scale))
            return ops.prepare_expert_weights(experts, decision)

        return replace(ops, prepare_expert_weights=prepare)

    found = only_fault(recording, plant, "quantized_moe_apply", LAYER)
    assert "larger by " in found.note
