"""No hook is there for show: the core calls every one when it runs models."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tests.fixtures.paged_models import reference_ops

from mortise import LLM, EngineConfig, SamplingParams
from mortise.engine import loading
from mortise.layers.gated_delta_net import GatedDeltaNet
from mortise.spec.hooks import HOOKS
from mortise.spec.qkv import QKVLayout, QKVShape
from mortise.spec.roles import ForwardMode, Phase

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from mortise.backends import BoundBackend
    from mortise.backends.ops import Ops

PROMPT_LEN = 40
"""More than the tiny model's ``index_topk`` of 16, so that keys have to be picked."""


class Recorder:
    """The names of called hooks in order, and the kind of each pass that was planned."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.modes: list[ForwardMode] = []

    def wrap(self, ops: Ops) -> Ops:
        """The same answers, every call written down."""
        return replace(ops, **{name: self._recorded(name, getattr(ops, name)) for name in HOOKS})

    def _recorded(self, name: str, hook: Callable[..., Any]) -> Callable[..., Any]:
        def recorded(*arguments: object) -> Any:
            self.names.append(name)
            self.modes += [one for one in arguments if isinstance(one, ForwardMode)]
            return hook(*arguments)

        return recorded

    @property
    def phases(self) -> list[Phase]:
        """The phase of each call."""
        return [HOOKS[name].phase for name in self.names]


def generate_text(model: Path, recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefill and decode a DeepSeek-V3.2 through the engine."""
    load = loading.load_backend

    def recording(*arguments: Any, **options: Any) -> BoundBackend:
        bound = load(*arguments, **options)
        return replace(bound, ops=recorder.wrap(bound.ops))

    monkeypatch.setattr(loading, "load_backend", recording)
    llm = LLM(EngineConfig(model=str(model), dtype="float32", cache={"max_num_tokens": 128}))
    llm.generate([list(range(PROMPT_LEN))], SamplingParams(max_tokens=3, ignore_eos=True))


def run_gated_delta_net(recorder: Recorder) -> None:
    """One pass of the one layer that asks for the split."""
    layer = GatedDeltaNet(
        hidden_size=16,
        shape=QKVShape(
            num_key_heads=1,
            num_value_heads=2,
            key_head_dim=8,
            value_head_dim=8,
            layout=QKVLayout.INTERLEAVED,
        ),
        conv_kernel_size=4,
        rms_norm_eps=1e-6,
        ops=recorder.wrap(reference_ops()),
    )
    layer(torch.zeros(3, 16), layer.new_state())


@pytest.fixture
def recorder(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    generate_text(tiny_model, recorder, monkeypatch)
    run_gated_delta_net(recorder)
    return recorder


def test_every_hook_is_called(recorder: Recorder) -> None:
    assert set(recorder.names) == set(HOOKS)
    assert {ForwardMode.PREFILL, ForwardMode.DECODE} <= set(recorder.modes)


def test_the_phases_run_in_their_order(recorder: Recorder) -> None:
    phases = recorder.phases
    assert list(dict.fromkeys(phases)) == [Phase.POLICY, Phase.LAYOUT, Phase.STEP, Phase.KERNEL]
    # Nothing is decided or laid out again once the model runs.
    assert not {Phase.POLICY, Phase.LAYOUT} & set(phases[phases.index(Phase.STEP) :])


def test_a_layer_is_decided_then_prepared_then_given_its_exchange(recorder: Recorder) -> None:
    built = recorder.names[: recorder.phases.index(Phase.STEP)]
    one_layer = ["resolve_dispatch_dtype", "prepare_expert_weights", "create_token_dispatcher"]
    assert built == one_layer * (len(built) // 3)


def test_every_pass_is_planned_once(recorder: Recorder) -> None:
    """However many layers score keys with the plan."""
    plans = recorder.names.count("paged_mqa_metadata")
    assert plans == len(recorder.modes) == 3  # the prompt, and two tokens after the first
    assert recorder.names.count("paged_mqa_logits") == plans * 3  # layers
