"""No hook is there for show: the core calls every one when it runs models."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tests.fixtures.drafted_models import save_drafted
from tests.fixtures.paged_models import reference_ops
from tests.fixtures.tiny_models import save_tiny

from mortise import LLM, EngineConfig, SamplingParams
from mortise.checkpoint.quantization.module_scheme import ModuleScheme
from mortise.engine import binding
from mortise.layers.linear import QuantizedLinear
from mortise.layers.stored_tensors import StoredTensors
from mortise.spec.dispatch import DispatchDecision, TokenDispatcherRequest
from mortise.spec.hooks import HOOKS
from mortise.spec.roles import ForwardMode, ModelRole, Phase
from mortise.spec.weights import WeightScheme

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from mortise.backends import BoundBackend
    from mortise.backends.ops import Ops

PROMPT_LEN = 40
"""More than the tiny model's ``index_topk`` of 16, so that keys have to be picked."""


class Recorder:
    """The names of called hooks in order, kinds of planned passes, decisions, and exchanges."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.modes: list[ForwardMode] = []
        self.decisions: list[DispatchDecision] = []
        self.exchanges: list[TokenDispatcherRequest] = []

    def wrap(self, ops: Ops) -> Ops:
        """The same answers, every call written down."""
        return replace(ops, **{name: self._recorded(name, getattr(ops, name)) for name in HOOKS})

    def _recorded(self, name: str, hook: Callable[..., Any]) -> Callable[..., Any]:
        def recorded(*arguments: object) -> Any:
            self.names.append(name)
            self.modes += [one for one in arguments if isinstance(one, ForwardMode)]
            self.exchanges += [one for one in arguments if isinstance(one, TokenDispatcherRequest)]
            answer = hook(*arguments)
            self.decisions += [answer] if isinstance(answer, DispatchDecision) else []
            return answer

        return recorded

    @property
    def phases(self) -> list[Phase]:
        """The phase of each call."""
        return [HOOKS[name].phase for name in self.names]


def generate_text(
    model: Path, recorder: Recorder, monkeypatch: pytest.MonkeyPatch, num_drafts: int = 0
) -> None:
    """Prefill and decode through the engine, or draft and verify."""
    load = binding.load_backend

    def recording(*arguments: Any, **options: Any) -> BoundBackend:
        bound = load(*arguments, **options)
        return replace(bound, ops=recorder.wrap(bound.ops))

    monkeypatch.setattr(binding, "load_backend", recording)
    llm = LLM(
        EngineConfig(
            model=str(model),
            dtype="float32",
            cache={"max_num_tokens": 128},
            draft={"num_tokens": num_drafts},
        )
    )
    llm.generate([list(range(PROMPT_LEN))], SamplingParams(max_tokens=3, ignore_eos=True))


def run_quantised_projection(recorder: Recorder) -> None:
    """Load one twice, as an update of the weights does, and run it three times."""
    scheme = ModuleScheme(scheme=WeightScheme.W8A8)
    tensors = StoredTensors(scheme, out_features=4, in_features=8, module="projection")
    layer = QuantizedLinear(
        recorder.wrap(reference_ops()), "layers.0.down_proj", tensors, bias=False
    )
    for value in (1, 2):
        stored = tensors.record()
        assert stored.scale is not None
        stored.weight.fill_(value)
        stored.scale.fill_(0.5)
        layer.finish_loading(torch.float32)
    for _ in range(3):
        assert torch.equal(layer(torch.ones(2, 8)), torch.full((2, 4), 8.0))


@pytest.fixture
def recorder(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    generate_text(tiny_model, recorder, monkeypatch)
    return recorder


def test_every_hook_is_called(
    recorder: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_quantised_projection(recorder)
    assert {ForwardMode.PREFILL, ForwardMode.DECODE} <= set(recorder.modes)
    assert set(HOOKS) - set(recorder.names) == {"qkv_split"}
    other = Recorder()
    generate_text(save_tiny(tmp_path, model_type="qwen3_next"), other, monkeypatch)
    assert "qkv_split" in other.names


def test_the_phases_run_in_their_order(recorder: Recorder) -> None:
    phases = recorder.phases
    assert list(dict.fromkeys(phases)) == [Phase.POLICY, Phase.LAYOUT, Phase.STEP, Phase.KERNEL]
    # Nothing is decided or laid out again once the model runs.
    assert not {Phase.POLICY, Phase.LAYOUT} & set(phases[phases.index(Phase.STEP) :])


def test_a_layer_is_decided_then_prepared_then_given_its_exchange(recorder: Recorder) -> None:
    built = recorder.names[: recorder.phases.index(Phase.STEP)]
    one_layer = ["resolve_dispatch_dtype", "prepare_expert_weights", "create_token_dispatcher"]
    assert built == one_layer * (len(built) // 3)


def test_an_exchange_is_told_what_was_decided(recorder: Recorder) -> None:
    decided = [decision.format for decision in recorder.decisions]
    assert decided == [request.format for request in recorder.exchanges]
    assert len(decided) == recorder.names.count("create_token_dispatcher") > 0


def test_every_pass_is_planned_once(recorder: Recorder) -> None:
    """However many layers score keys with the plan."""
    plans = recorder.names.count("paged_mqa_metadata")
    assert plans == len(recorder.modes) == 3  # the prompt, and two tokens after the first
    assert recorder.names.count("paged_mqa_logits") == plans * 3  # layers


def test_every_pass_of_a_step_with_drafts_is_planned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None of the modes is forgotten, of either model; and both are bound and asked apart."""
    recorder = Recorder()
    generate_text(save_drafted(tmp_path), recorder, monkeypatch, num_drafts=2)
    step = [ForwardMode.DECODE, ForwardMode.TARGET_VERIFY, ForwardMode.DRAFT_EXTEND]
    first = [ForwardMode.PREFILL, ForwardMode.PREFILL]
    assert recorder.modes[:5] == first + step
    assert recorder.modes[2:] == step * (len(recorder.modes[2:]) // 3)
    assert [request.role for request in recorder.exchanges] == [
        ModelRole.MAIN,
        ModelRole.MAIN,
        ModelRole.DRAFT,
    ]


def test_a_projection_is_prepared_with_its_weights_and_multiplied_in_every_pass() -> None:
    recorder = Recorder()
    run_quantised_projection(recorder)
    assert recorder.names == ["prepare_linear_weight"] * 2 + ["quantized_linear"] * 3
