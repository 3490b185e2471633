"""Whatever is drafted, accepted and rejected, a hybrid model goes on as in plain decoding."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.fixtures.hybrid_models import MODEL_TYPES, HybridModel, Request, loaded, tokens_of

from mortise.layers.recurrence import VerifiedStates
from mortise.spec.roles import ForwardMode

if TYPE_CHECKING:
    from pathlib import Path

# Plain decoding of these requests together differs from each alone by up to 3e-5.
TOLERANCE = 1e-4
NUM_GENERATED = 26
PROMPTS = (5, 61, 33)
"""The second request crosses from one page to the next while it generates."""
PAGES = ([7, 2], [5, 11], [1, 20])
SLOTS = (4, 0, 3)
NUMBERS = range(len(PROMPTS))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@cache
def decoded(model_type: str, root: Path, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy tokens of one request alone, one decoded after another, and the logits of each."""
    model = loaded(model_type, root)
    model.poison()
    tokens, mode, logits = tokens_of(PROMPTS[number], seed=number), ForwardMode.PREFILL, []
    new = tokens
    for _ in range(NUM_GENERATED):
        got = model.forward(mode, [Request(new, len(tokens), [3, 4], 1)])[-1]
        logits.append(got)
        mode, new = ForwardMode.DECODE, got.argmax().view(1)
        tokens = torch.cat([tokens, new])
    return tokens[PROMPTS[number] :], torch.stack(logits)


class Drafting:
    """Three requests that generate greedily, each with drafts that are right so far and no more."""

    def __init__(self, model_type: str, root: Path) -> None:
        self.expected = [decoded(model_type, root, number) for number in NUMBERS]
        self.model: HybridModel = loaded(model_type, root)
        self.model.poison()
        self.slots = list(SLOTS)
        self.generated: list[torch.Tensor] = []
        self.logits: list[torch.Tensor] = []
        for number in NUMBERS:
            got = self.prefill(number, self.prompt(number))[-1:]
            self.logits.append(got)
            self.generated.append(got.argmax(-1))

    def prompt(self, number: int) -> torch.Tensor:
        return tokens_of(PROMPTS[number], seed=number)

    def prefill(self, number: int, tokens: torch.Tensor) -> torch.Tensor:
        request = Request(tokens, len(tokens), PAGES[number], self.slots[number])
        return self.model.forward(ForwardMode.PREFILL, [request])

    def preempt(self, number: int) -> None:
        """Compute a request again in the spare slot; its own becomes the spare one."""
        (spare,) = {*SLOTS, 2} - {*self.slots}
        self.slots[number] = spare
        self.prefill(number, torch.cat([self.prompt(number), self.generated[number][:-1]]))

    def request(self, number: int, num_drafts: int, num_right: int) -> Request:
        """The newest token and its drafts, of which the first so many are right."""
        done = len(self.generated[number])
        drafts = self.expected[number][0][done : done + num_drafts].clone()
        drafts[num_right:] += 1
        return Request(
            torch.cat([self.generated[number][-1:], drafts]),
            PROMPTS[number] + done + num_drafts,
            PAGES[number],
            self.slots[number],
        )

    def step(self, rights: list[int], num_drafts: int, *, is_dropped: bool = False) -> None:
        """Verify drafts of which the first so many are right, and accept them."""
        requests = [self.request(number, num_drafts, right) for number, right in enumerate(rights)]
        logits, verifying = self.model.run(ForwardMode.TARGET_VERIFY, requests)
        if is_dropped:
            return
        accepted = []
        for number, (request, own) in enumerate(
            zip(requests, logits.split(num_drafts + 1), strict=True)
        ):
            chosen = own.argmax(-1)
            agrees = chosen[:-1] == request.tokens[1:]
            accepted.append(int(agrees.long().cumprod(0).sum()) + 1)
            self.generated[number] = torch.cat([self.generated[number], chosen[: accepted[-1]]])
            self.logits[number] = torch.cat([self.logits[number], own[: accepted[-1]]])
        assert accepted == [right + 1 for right in rights]
        verifying.accept(accepted)

    def check(self) -> None:
        for number, (tokens, logits) in enumerate(self.expected):
            count = len(self.generated[number])
            assert self.generated[number].tolist() == tokens[:count].tolist()
            difference = float((self.logits[number] - logits[:count]).abs().max())
            assert difference < TOLERANCE, f"logits differ by {difference}"


@st.composite
def steps(draw: st.DrawFn) -> list[tuple[str, int, list[int]]]:
    """``(kind, number of drafts, right ones of each request)``."""
    plan = []
    for _ in range(draw(st.integers(1, 5))):
        num_drafts = draw(st.integers(0, 4))
        rights = [draw(st.integers(0, num_drafts)) for _ in NUMBERS]
        plan.append(
            (draw(st.sampled_from(["accept"] * 4 + ["drop", "preempt"])), num_drafts, rights)
        )
    return plan


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@given(plan=steps())
@settings(max_examples=5, deadline=None)
def test_drafting_gives_the_tokens_and_logits_of_plain_decoding(
    root: Path, model_type: str, plan: list[tuple[str, int, list[int]]]
) -> None:
    drafting = Drafting(model_type, root)
    for kind, num_drafts, rights in plan:
        if kind == "preempt":
            drafting.preempt(num_drafts % len(PROMPTS))
        drafting.step(rights, num_drafts, is_dropped=kind == "drop")
    drafting.check()


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_without_drafts_it_is_plain_decoding_to_the_bit(root: Path, model_type: str) -> None:
    logits = []
    for mode in (ForwardMode.DECODE, ForwardMode.TARGET_VERIFY):
        drafting = Drafting(model_type, root)
        for _ in range(3):
            requests = [drafting.request(number, 0, 0) for number in NUMBERS]
            got, hybrid_pass = drafting.model.run(mode, requests)
            if mode is ForwardMode.TARGET_VERIFY:
                hybrid_pass.accept([1] * len(requests))
            logits.append(got)
            for number, token in enumerate(got.argmax(-1)):
                drafting.generated[number] = torch.cat([drafting.generated[number], token.view(1)])
    assert torch.equal(torch.stack(logits[:3]), torch.stack(logits[3:]))


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_one_token_too_many_would_show(root: Path, model_type: str) -> None:
    """Else the test above could pass with states that nobody moved back."""
    following = []
    for accepted in (1, 2):
        drafting = Drafting(model_type, root)
        request = drafting.request(0, 1, 0)
        verifying = drafting.model.run(ForwardMode.TARGET_VERIFY, [request])[1]
        verifying.accept([accepted])
        following.append(drafting.model.forward(ForwardMode.DECODE, [drafting.request(0, 0, 0)]))
    assert (following[0] - following[1]).abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize("mode", sorted(set(ForwardMode) - {ForwardMode.TARGET_VERIFY}))
def test_only_a_pass_that_verifies_is_accepted(root: Path, mode: ForwardMode) -> None:
    model = loaded(MODEL_TYPES[0], root)
    model.poison()
    _, hybrid_pass = model.run(mode, [Request(tokens_of(1), 1, [0], 0)])
    assert model.pool.states.memory(0)[0].isfinite().all(), "the pass moved no state"
    with pytest.raises(AssertionError, match="as it ran"):
        hybrid_pass.accept([1])


def test_what_a_pass_keeps_is_seen(root: Path) -> None:
    model = loaded(MODEL_TYPES[0], root)
    _, hybrid_pass = model.run(ForwardMode.TARGET_VERIFY, [Request(tokens_of(4), 4, [0], 0)])
    assert isinstance(hybrid_pass.recur, VerifiedStates)
    assert hybrid_pass.recur.num_bytes == 4 * model.pool.states.num_bytes // 6
