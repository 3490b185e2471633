"""What is told of a loaded model without being asked for: once, and for which of two models."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from mortise.testing.distributions import QKV_SPLIT, FakeDistribution, backend_code
from tests.cli.command_line import mortise

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# Whether it is emulated, and sends no fp8, are options, which each model has of its own.
OPTIONAL = """
@classmethod
def create(cls, context):
    made = cls()
    made.options = dict(context.options)
    return made

def capabilities(self):
    return Capabilities(
        device=torch.device("cpu"),
        emulated=self.options.get("emulated", False),
        schemes=frozenset({WeightScheme.FLOAT}),
        dispatch_dtypes=frozenset({DispatchDtype.BF16, DispatchDtype.FP32}),
        compute_dtypes=(torch.bfloat16, torch.float32),
        page_sizes=frozenset({64}),
        num_workers=1,
    )

@hookimpl
def resolve_dispatch_dtype(self, request):
    from dataclasses import replace
    from mortise.reference.dispatch import resolve_dispatch_dtype
    decision = resolve_dispatch_dtype(request)
    if not self.options.get("substitutes", False):
        return decision
    return replace(decision, asked=DispatchDtype.FP8_E4M3, reason="it sends no fp8")
"""
SUBSTITUTION = "rows travel to the experts as bf16 instead of fp8: it sends no fp8"


@pytest.fixture(autouse=True)
def backends(tmp_path: Path) -> Iterator[None]:
    distributions = FakeDistribution(tmp_path / "site")
    distributions.add_backend(
        "moody",
        code=backend_code(QKV_SPLIT + OPTIONAL),
        manifest={"implements": {"qkv_split": 1, "resolve_dispatch_dtype": 1}},
    )
    with distributions.installed():
        yield


def news(*settings: str, num_drafts: int = 1) -> list[str]:
    """The warnings of a run with these settings."""
    arguments = [text for setting in settings for text in ("--set", setting)]
    outcome = mortise("explain", "--backend", "moody", "--draft", str(num_drafts), *arguments)
    assert outcome.code == 0, outcome.stderr
    lines = outcome.stderr.splitlines()
    assert all(line.startswith("warning: ") for line in lines)
    return [line.removeprefix("warning: ") for line in lines]


def test_what_holds_for_both_models_is_told_once_for_both() -> None:
    options = [f"backend_options.moody.{name}=true" for name in ("emulated", "substitutes")]
    fallbacks, *others = news(*options)
    assert fallbacks.startswith("backend 'moody' does not implement prepare_expert_weights, ")
    assert others == [SUBSTITUTION, "backend 'moody' is emulated: its numerics, not its speed"]


def test_what_holds_for_one_model_says_for_which() -> None:
    main = news("backend_options.moody.emulated=true", "draft.backend_options.moody.emulated=false")
    assert main[1:] == [
        "main model: backend 'moody' is emulated: its numerics, not its speed",
    ]
    draft = news("draft.backend_options.moody.substitutes=true")
    assert draft[1:] == [f"draft model: {SUBSTITUTION}"]


def test_of_one_model_nothing_says_for_which() -> None:
    assert news("backend_options.moody.substitutes=true", num_drafts=0)[1:] == [SUBSTITUTION]


def test_options_of_a_draft_for_a_backend_that_is_not_installed() -> None:
    setting = "draft.backend_options.mody.emulated=true"
    told = "draft.backend_options.mody is for a backend that is not installed"
    assert told in news(setting)
    assert told not in news(setting, num_drafts=0)
