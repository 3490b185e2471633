"""Whatever comes, and with little memory: every request gets its own tokens, and soon."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mortise.engine.sampling_params import SamplingParams
from mortise.errors import CapacityError
from mortise.kv.pages import PAGE_SIZE
from mortise.spec.roles import ForwardMode
from tests.engine.fake_model import VOCABULARY, expected_tokens, fake_engine

if TYPE_CHECKING:
    from mortise.engine.engine import Engine
    from mortise.engine.request import Request


@dataclass(frozen=True)
class Arrival:
    step: int
    prompt_len: int
    max_tokens: int

    def prompt(self, number: int) -> list[int]:
        return [(number * 13 + place * place) % VOCABULARY for place in range(self.prompt_len)]


arrivals = st.lists(
    st.builds(
        Arrival,
        step=st.integers(0, 20),
        prompt_len=st.integers(1, 150),
        max_tokens=st.integers(1, 80),
    ),
    min_size=1,
    max_size=6,
)


def drive(engine: Engine, waiting: list[tuple[Arrival, Request]], max_steps: int) -> int:
    """Add requests when they arrive and step until all are done; the steps that took."""
    pending = sorted(waiting, key=lambda entry: entry[0].step)
    for step in range(max_steps):
        while pending and pending[0][0].step <= step:
            engine.add(pending.pop(0)[1])
        if engine.has_work:
            engine.step()
        elif not pending:
            return step
        engine.scheduler.check_integrity()
    raise AssertionError(f"not done after {max_steps} steps")


@given(
    arrivals=arrivals,
    num_pages=st.integers(4, 12),
    max_num_seqs=st.integers(1, 5),
    max_num_batched_tokens=st.integers(1, 200),
    num_draft_tokens=st.integers(0, 5),
    wrong=st.integers(0, 5),
    context=st.sampled_from([231, 240, 100_000]),
)
@settings(max_examples=90, deadline=None)
def test_every_request_gets_exactly_its_own_tokens(
    arrivals: list[Arrival],
    num_pages: int,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    num_draft_tokens: int,
    wrong: int,
    context: int,
) -> None:
    engine, model = fake_engine(
        num_pages=num_pages,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        num_draft_tokens=num_draft_tokens,
        wrong=wrong,
        context=context,
    )
    # Numbers are given in the order of arrival.
    ordered = sorted(arrivals, key=lambda arrival: arrival.step)
    requests = [
        (arrival, engine.request(arrival.prompt(i), SamplingParams(max_tokens=arrival.max_tokens)))
        for i, arrival in enumerate(ordered)
    ]

    drive(engine, requests, max_steps=40_000)

    for arrival, request in requests:
        prompt = request.token_ids[: request.num_prompt_tokens]
        assert request.generated_token_ids == expected_tokens(prompt, arrival.max_tokens)
        assert request.finish is not None
        assert request.finish.reason == "length"
    for layout in model.batches:
        assert len(layout.query_lens) <= max_num_seqs
        assert max(layout.context_lens) <= context, "no position beyond those the model knows"
        if layout.mode is ForwardMode.PREFILL:
            assert sum(layout.query_lens) <= max_num_batched_tokens
        if layout.mode is ForwardMode.TARGET_VERIFY:
            assert set(layout.query_lens) == {num_draft_tokens + 1}
    assert engine._allocator.num_free == num_pages
    assert engine._slots.num_free == max_num_seqs + 1
    assert all(set(layout.state_slots) <= set(range(max_num_seqs + 1)) for layout in model.batches)


def run_all(engine: Engine, requests: list[Request]) -> None:
    for request in requests:
        engine.add(request)
    while engine.has_work:
        engine.step()
        engine.scheduler.check_integrity()


def test_the_youngest_gives_way_and_generates_the_same() -> None:
    prompts = [[1] * 60, [2] * 60, [3] * 60]
    engine, _ = fake_engine(num_pages=6)
    requests = [engine.request(prompt, SamplingParams(max_tokens=150)) for prompt in prompts]
    run_all(engine, requests)
    assert [request.num_preemptions > 0 for request in requests] == [False, True, True]
    assert [request.generated_token_ids for request in requests] == [
        expected_tokens(prompt, 150) for prompt in prompts
    ]


def test_several_prompts_share_one_pass() -> None:
    engine, model = fake_engine(max_num_batched_tokens=100)
    requests = [engine.request([n] * 30, SamplingParams(max_tokens=2)) for n in range(4)]
    run_all(engine, requests)
    first, second = (layout.query_lens for layout in model.batches[:2])
    assert first == (30, 30, 30, 10)
    # The three that are read already get their second token before the fourth is read to its end.
    assert second == (1, 1, 1)


def test_prompts_that_keep_coming_do_not_stop_the_others() -> None:
    engine, model = fake_engine(num_pages=64, max_num_seqs=8, max_num_batched_tokens=16)
    first = engine.request([1] * 16, SamplingParams(max_tokens=20))
    engine.add(first)
    engine.step()
    steps = 0
    while first.finish is None:
        if engine.scheduler.num_waiting == 0:
            engine.add(engine.request([2] * 200, SamplingParams(max_tokens=1)))
        engine.step()
        steps += 1
    assert steps <= 2 * 20
    modes = [layout.mode for layout in model.batches]
    assert ForwardMode.PREFILL in modes[2:]


def test_a_short_prompt_does_not_overtake_one_that_waits_for_pages() -> None:
    engine, _ = fake_engine(num_pages=4)
    running = engine.request([1] * 64, SamplingParams(max_tokens=65))
    large = engine.request([2] * 200, SamplingParams(max_tokens=1))
    small = engine.request([3], SamplingParams(max_tokens=1))
    run_all(engine, [running, large, small])
    assert running.finished_at is not None
    assert large.finished_at is not None
    assert small.finished_at is not None
    assert running.finished_at < large.finished_at <= small.finished_at


def test_a_request_given_up_frees_its_pages() -> None:
    engine, _ = fake_engine(num_pages=4)
    running = engine.request([1] * 100, SamplingParams(max_tokens=5))
    waiting = engine.request([1] * 100, SamplingParams(max_tokens=5))
    engine.add(running)
    engine.add(waiting)
    engine.step()
    engine.abort(running)
    engine.abort(waiting)
    engine.abort(waiting)
    assert not engine.has_work
    assert engine._allocator.num_free == 4
    assert running.finish is not None
    assert running.finish.reason == "aborted"


def test_what_can_never_fit_is_refused_before_it_is_queued() -> None:
    engine, _ = fake_engine(num_pages=2)
    fits = engine.request([1] * 100, SamplingParams(max_tokens=29))
    run_all(engine, [fits])
    assert len(fits.generated_token_ids) == 29
    with pytest.raises(CapacityError, match="needs 129 places in the cache") as caught:
        engine.request([1] * 100, SamplingParams(max_tokens=30))
    assert "at most 128: 2 pages" in str(caught.value)
    assert "cache.max_num_tokens" in str(caught.value)


def test_a_request_that_fills_the_cache_to_the_last_place_runs() -> None:
    engine, _ = fake_engine(num_pages=3, max_num_seqs=2)
    prompt_len = 3 * PAGE_SIZE - 10
    whole = engine.request([5] * prompt_len, SamplingParams(max_tokens=11))
    other = engine.request([6] * 10, SamplingParams(max_tokens=100))
    run_all(engine, [other, whole])
    assert whole.generated_token_ids == expected_tokens([5] * prompt_len, 11)
    assert other.generated_token_ids == expected_tokens([6] * 10, 100)


@pytest.mark.parametrize(("wrong", "steps"), [(0, 10), (1, 40)])
def test_drafts_that_are_right_save_steps_and_wrong_ones_cost_none(wrong: int, steps: int) -> None:
    engine, model = fake_engine(num_draft_tokens=3, wrong=wrong)
    request = engine.request([1, 2, 3], SamplingParams(max_tokens=41))
    run_all(engine, [request])
    assert request.generated_token_ids == expected_tokens([1, 2, 3], 41)
    verifying = [one for one in model.batches if one.mode is ForwardMode.TARGET_VERIFY]
    assert len(verifying) == steps
    assert request.drafting is not None
    accepted = 0 if wrong else steps
    assert request.drafting.accepted_by_place == (accepted,) * 3
    assert (request.drafting.steps, request.drafting.drafted) == (steps, 3 * steps)


def test_the_last_tokens_of_a_context_are_decoded_without_drafts() -> None:
    engine, model = fake_engine(num_draft_tokens=4, wrong=1, context=40)
    request = engine.request([5] * 30, SamplingParams(max_tokens=10))
    run_all(engine, [request])
    assert request.generated_token_ids == expected_tokens([5] * 30, 10)
    modes = [layout.mode for layout in model.batches]
    # Of 31 to 36 tokens four more fit.
    verify, decode = [ForwardMode.TARGET_VERIFY] * 6, [ForwardMode.DECODE] * 3
    assert modes == [ForwardMode.PREFILL, *verify, *decode]


def test_drafted_and_other_requests_and_prompts_take_turns() -> None:
    engine, model = fake_engine(num_draft_tokens=2, wrong=1, context=64, max_num_batched_tokens=8)
    nearly_full = engine.request([1] * 55, SamplingParams(max_tokens=9))
    short = engine.request([2] * 4, SamplingParams(max_tokens=12))
    run_all(engine, [nearly_full, short])
    assert nearly_full.generated_token_ids == expected_tokens([1] * 55, 9)
    assert short.generated_token_ids == expected_tokens([2] * 4, 12)
    modes = [layout.mode for layout in model.batches]
    # From the 63rd token on one of them has no room for drafts: it is given a token in every
    # second step, whatever the other does.
    first = modes.index(ForwardMode.DECODE)
    assert modes[first - 1 :][:3] == [
        ForwardMode.TARGET_VERIFY,
        ForwardMode.DECODE,
        ForwardMode.TARGET_VERIFY,
    ]


@pytest.mark.parametrize("place", ["run", "logits", "draft"])
def test_a_step_that_fails_changes_no_request(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, model = fake_engine(num_draft_tokens=2)
    requests = [engine.request([n] * 20, SamplingParams(max_tokens=30)) for n in (1, 2)]
    for request in requests:
        engine.add(request)
    for _ in range(4):
        engine.step()
    before = [list(request.token_ids) for request in requests]

    def fail(*_: object) -> None:
        raise ValueError("thrown on purpose")

    assert engine.drafter is not None
    owner = engine.drafter._draft if place == "draft" else model
    with monkeypatch.context() as patch:
        patch.setattr(owner, "run" if place == "draft" else place, fail)
        with pytest.raises(ValueError, match="on purpose"):
            engine.step()
    assert [request.token_ids for request in requests] == before
    engine.scheduler.check_integrity()
    while engine.has_work:
        engine.step()
        engine.scheduler.check_integrity()
    for number, request in enumerate(requests, 1):
        assert request.generated_token_ids == expected_tokens([number] * 20, 30)
        assert request.num_preemptions == 1
