"""A recording says what a run did, and the same backend answers it to the bit."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import pytest

from mortise import LLM, EngineConfig, SamplingParams
from mortise.config import ResolvedConfig
from mortise.recording.outcome import Verdict, sentence
from mortise.recording.session import record
from mortise.spec.hooks import HOOKS
from tests.engine.test_independent_models import quantised
from tests.fixtures.drafted_models import save_drafted
from tests.fixtures.recorded_runs import PROMPT, recorded, replayed
from tests.fixtures.tiny_models import save_tiny

if TYPE_CHECKING:
    from pathlib import Path

    from mortise import Completion
    from mortise.recording.reader import Recording


@pytest.fixture(scope="module")
def drafted(tmp_path_factory: pytest.TempPathFactory) -> Recording:
    """A run that drafts, so that both roles and every kind of pass but idling are there."""
    folder = tmp_path_factory.mktemp("drafted")
    model = save_drafted(folder / "model")
    return recorded(model, folder / "recording", draft={"num_tokens": 2}, max_tokens=6)


def require_same(recording: Recording) -> None:
    report = replayed(recording)
    assert {one.verdict for one in report.outcomes} == {Verdict.SAME, Verdict.NOT_COMPARED}
    assert all(one.difference is None or one.difference.is_none for one in report.outcomes)
    assert report.is_clean, sentence(report)


@pytest.mark.parametrize("scheme", ["fp8-block", "w4a8", "nvfp4"])
def test_a_quantised_run_is_answered_to_the_bit(
    tiny_model: Path, tmp_path: Path, scheme: str
) -> None:
    model = quantised(tiny_model, tmp_path / "model", scheme)
    recording = recorded(model, tmp_path / "recording", index_key_dtype="fp8")
    require_same(recording)
    assert "quantized_linear" in {call.hook for call in recording.calls}


def test_a_low_latency_run_is_answered_to_the_bit(tiny_model: Path, tmp_path: Path) -> None:
    """Masked rows, with counts that nobody told the host."""
    dispatch = {"mode": "low_latency", "max_tokens_per_rank": 64}
    scheduler = {"max_num_batched_tokens": 64}
    require_same(
        recorded(tiny_model, tmp_path / "recording", dispatch=dispatch, scheduler=scheduler)
    )


def test_a_hybrid_run_is_answered_to_the_bit(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model", model_type="qwen3_next")
    recording = recorded(model, tmp_path / "recording")
    require_same(recording)
    splits = {call.layer for call in recording.calls if call.hook == "qkv_split"}
    assert splits == {"model.layers.0.linear_attn", "model.layers.2.linear_attn"}


@pytest.mark.parametrize("threads", [1, 2])
def test_a_float32_run_is_answered_to_the_bit(
    tiny_model: Path, tmp_path: Path, threads: int
) -> None:
    """Whose sums hang on the number of threads in their last bits."""
    path = tmp_path / "recording"
    require_same(recorded(tiny_model, path, dtype="float32", threads=threads))


def test_a_drafted_run_is_answered_to_the_bit(drafted: Recording) -> None:
    require_same(drafted)


def test_every_call_says_who_made_it_and_when(drafted: Recording) -> None:
    computing = [call for call in drafted.calls if call.forward_pass]
    assert {call.role for call in computing} == {"main", "draft"}
    assert all(call.layer for call in computing if call.hook != "paged_mqa_metadata")
    assert all(call.mode for call in computing)
    assert {call.mode for call in computing} >= {"prefill", "target_verify", "draft_extend"}
    numbers = [call.number for call in drafted.calls]
    assert numbers == sorted(set(numbers))
    assert len(numbers) == drafted.header.num_calls
    passes = [call.forward_pass for call in drafted.calls]
    assert passes == sorted(passes)
    # One pass is of one model and of one kind.
    assert len({(call.forward_pass, call.role, call.mode) for call in computing}) == max(passes)


def test_every_hook_is_recorded(drafted: Recording, tmp_path: Path) -> None:
    found = {call.hook for call in drafted.calls}
    model = quantised(
        save_tiny(tmp_path / "plain", model_type="qwen3_next"), tmp_path / "model", "w8a8"
    )
    found |= {call.hook for call in recorded(model, tmp_path / "recording", max_tokens=1).calls}
    assert set(HOOKS) <= found
    assert found - set(HOOKS) == {"supports", "supports_linear", "dispatch", "combine"}


def test_recording_changes_no_token(tiny_model: Path, tmp_path: Path) -> None:
    config = EngineConfig(
        model=str(tiny_model), dtype="bfloat16", cache={"max_num_tokens": 512}, threads=1
    )
    sampling = SamplingParams(max_tokens=6, ignore_eos=True)
    found: list[Completion] = []
    record(
        ResolvedConfig.of(config),
        tmp_path / "recording",
        lambda llm: found.extend(llm.generate(PROMPT, sampling)),
    )
    expected = LLM(config).generate(PROMPT, sampling)
    assert [one.token_ids for one in found] == [one.token_ids for one in expected]


def test_every_pass_calls_every_layer(tiny_model: Path, tmp_path: Path) -> None:
    recording = recorded(tiny_model, tmp_path / "recording", max_tokens=3)
    counts = Counter(call.mode for call in recording.calls if call.hook == "quantized_moe_apply")
    # The first layer is dense; the last token that is generated is never read.
    assert counts == {"prefill": 2, "decode": 4}


def test_weights_are_kept_once(drafted: Recording) -> None:
    prepared = [call for call in drafted.calls if call.hook == "prepare_expert_weights"]
    assert len(prepared) == len({(call.role, call.layer) for call in prepared})
    weights = sum(
        drafted.value(call.arguments[name]).weight.nbytes
        for call in prepared
        for name in ("w13", "w2")
    )
    assert weights < drafted.header.tensor_bytes < 3 * weights
