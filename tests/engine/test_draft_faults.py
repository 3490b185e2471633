"""An exception anywhere in a step that drafts: the step did not happen, and all else goes on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from torch.overrides import TorchFunctionMode

from mortise import LLM, SamplingParams
from tests.cli.command_line import mortise
from tests.fixtures.drafted_models import drafting, held_out_prompts, save_drafted, tokens_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from mortise.backends import Ops
    from mortise.engine.events import TokenEvent

GREEDY = SamplingParams(max_tokens=14, ignore_eos=True)
FAMILIES = ("deepseek_v32", "glm4_moe", "qwen3_next")
NUM_DRAFTS = 3
FIRST_DRAFTS, LATER = 2, 4
"""Steps, counted from 0: two read the prompts of two generations."""
PLACES = 12
"""Operations of a step that fail, one in each trial, from its first to its last."""


class InjectedError(Exception):
    """Nobody else raises it."""


class Fault(TorchFunctionMode):
    """Counts operations of torch, and raises at one of them.

    Args:
        fails_at: number of the operation, from 0; None never fails.
    """

    def __init__(self, fails_at: int | None = None) -> None:
        super().__init__()
        self.count = 0
        self.fails_at = fails_at

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        number, self.count = self.count, self.count + 1
        if number == self.fails_at:
            raise InjectedError(f"operation {number}")
        return func(*args, **(kwargs or {}))


class Case(NamedTuple):
    """A model that drafts well, prompts, and what it generates without drafting."""

    path: Path
    prompts: list[list[int]]
    expected: list[tuple[int, ...]]


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    path = save_drafted(tmp_path_factory.mktemp("drafted") / "model", model_type=request.param)
    plain = drafting(path)
    prompts = held_out_prompts(plain.tokenizer, 12)[6:]
    return Case(path, prompts, tokens_of(plain.generate(prompts, GREEDY)))


def two_generations(case: Case, llm: LLM, step: int, fault: Fault | FailingHook) -> None:
    """Run two at once, one step of them under a fault; the one that meets it ends, no other."""
    steps = iter(range(step))

    def faulty() -> list[TokenEvent]:
        if next(steps, None) is not None:
            return original()
        llm._engine.step = original
        with fault:
            return original()

    original, llm._engine.step = llm._engine.step, faulty
    first, second = llm.stream(case.prompts[:3], GREEDY), llm.stream(case.prompts[3:], GREEDY)
    next(first)
    if fault.fails_at is None:
        assert tokens_of(second.completions()) == case.expected[3:]
    else:
        with pytest.raises(InjectedError):
            second.completions()
        assert fault.count == fault.fails_at + 1
    assert tokens_of(first.completions()) == case.expected[:3], fault.fails_at
    check(case, llm)


def check(case: Case, llm: LLM) -> None:
    """Nothing is left behind, and what comes next is what it would be."""
    llm._engine.scheduler.check_integrity()
    assert not llm._engine.has_work
    assert tokens_of(llm.generate(case.prompts[1:4], GREEDY)) == case.expected[1:4]
    llm._engine.scheduler.check_integrity()


@pytest.mark.parametrize("step", [FIRST_DRAFTS, LATER])
def test_at_any_operation_of_a_step(case: Case, step: int) -> None:
    """Of drafts, of the pass that verifies them, of accepting them, and of reading them."""
    llm = drafting(case.path, NUM_DRAFTS)
    whole = Fault()
    two_generations(case, llm, step, whole)
    assert whole.count > 10 * PLACES
    for number in range(PLACES):
        two_generations(case, llm, step, Fault(number * (whole.count - 1) // (PLACES - 1)))


class FailingHook:
    """One hook of one role, which raises at one of its calls.

    Args:
        ops: of the role.
        hook: its name.
        fails_at: number of the call, from 0; None never fails.
    """

    def __init__(self, ops: Ops, hook: str, fails_at: int | None = None) -> None:
        self.ops, self.hook, self.fails_at = ops, hook, fails_at
        self.count = 0
        self.original = getattr(ops, hook)

    def __call__(self, *arguments: Any) -> Any:
        number, self.count = self.count, self.count + 1
        if number == self.fails_at:
            raise InjectedError(f"call {number} of {self.hook}")
        return self.original(*arguments)

    def __enter__(self) -> None:
        object.__setattr__(self.ops, self.hook, self)

    def __exit__(self, *_: object) -> None:
        object.__setattr__(self.ops, self.hook, self.original)


HOOKS = {
    "deepseek_v32": (
        "paged_mqa_metadata",
        "paged_mqa_logits",
        "quantized_moe_apply",
        "quantized_linear",
    ),
    "qwen3_next": ("qkv_split", "quantized_moe_apply", "quantized_linear"),
}


@pytest.mark.parametrize("model_type", HOOKS)
def test_within_a_hook_of_either_role(model_type: str, tmp_path: Path) -> None:
    """Both roles are quantised, and the main model's hooks are not the draft's."""
    plain = save_drafted(tmp_path / "plain", model_type=model_type)
    path = tmp_path / "w8a8"
    schemes = ("--scheme", "w8a8", "--draft-scheme", "w8a8")
    outcome = mortise("quantize", path, "--model", plain, *schemes)
    assert outcome.code == 0, outcome.stderr
    without = drafting(path)
    prompts = held_out_prompts(without.tokenizer, 12)[6:]
    case = Case(path, prompts, tokens_of(without.generate(prompts, GREEDY)))
    llm = drafting(path, NUM_DRAFTS)
    assert llm.loaded.draft is not None
    for role in (llm.loaded, llm.loaded.draft):
        for name in HOOKS[model_type]:
            hook = FailingHook(role.bound.ops, name)
            two_generations(case, llm, LATER, hook)
            # The draft of a hybrid model has no delta net.
            assert hook.count or (name == "qkv_split" and role is llm.loaded.draft)
            for fails_at in {0, hook.count // 2, hook.count - 1} if hook.count else ():
                two_generations(case, llm, LATER, FailingHook(role.bound.ops, name, fails_at))
