"""Models side by side in one process change nothing of each other, whatever their schemes."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations
from typing import TYPE_CHECKING

import pytest
import torch

from mortise import LLM, EngineConfig, SamplingParams
from mortise.layers.moe import MoELayer
from mortise.spec.dispatch import DispatchDtype
from tests.cli.command_line import mortise
from tests.fixtures.tiny_models import save_tiny

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

SCHEMES = ("fp8-block", "w8a8", "w4a8", "w4a16", "w4a4", "nvfp4")
PROMPTS = ([5, 6, 7, 8] * 6, [1, 2, 3])
SEQUENCE = list(range(30, 60))
STEPS = 5


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny model, and what became of it in each scheme."""
    folder = tmp_path_factory.mktemp("schemes")
    found = {"plain": save_tiny(folder / "plain")}
    for scheme in SCHEMES:
        outcome = mortise(
            "quantize", folder / scheme, "--model", found["plain"], "--scheme", scheme
        )
        assert outcome.code == 0, outcome.stderr
        found[scheme] = folder / scheme
    return found


def quantised(model: Path, path: Path, scheme: str) -> Path:
    """What `mortise quantize` makes of a model."""
    outcome = mortise("quantize", path, "--model", model, "--scheme", scheme)
    assert outcome.code == 0, outcome.stderr
    return path


def load(path: Path) -> LLM:
    return LLM(EngineConfig(model=str(path), dtype="bfloat16", cache={"max_num_tokens": 256}))


def run(llms: Sequence[LLM]) -> list[tuple[list[tuple[int, ...]], torch.Tensor]]:
    """Tokens of each model, the steps of all of them mixed, then the logits of a sequence."""
    sampling = SamplingParams(max_tokens=STEPS, ignore_eos=True)
    streams = [llm.stream(list(PROMPTS), sampling) for llm in llms]
    for _ in range(STEPS * len(PROMPTS)):
        for stream in streams:
            next(stream, None)
    tokens = [[one.token_ids for one in stream.completions()] for stream in streams]
    logits = [llm.logits(SEQUENCE) for llm in llms]
    return list(zip(tokens, logits, strict=True))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_interleaved_models_are_bit_identical_to_each_alone(
    models: dict[str, Path], scheme: str
) -> None:
    alone = {name: run([load(models[name])])[0] for name in ("plain", scheme)}
    for order in permutations(alone):
        together = run([load(models[name]) for name in order])
        for name, (tokens, logits) in zip(order, together, strict=True):
            assert tokens == alone[name][0], f"{name} of {order}"
            assert torch.equal(logits, alone[name][1]), f"{name} of {order}"


def test_a_model_that_is_gone_leaves_the_other_as_it_was(models: dict[str, Path]) -> None:
    quantised = load(models["w8a8"])
    before = quantised.logits(SEQUENCE)
    plain = load(models["plain"])
    plain.logits(SEQUENCE)
    del plain
    assert torch.equal(quantised.logits(SEQUENCE), before)
    assert {
        decision.format.dtype
        for decisions in quantised.loaded.dispatch.values()
        for decision in decisions
    } == {DispatchDtype.INT8}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_new_weights_decide_afresh_and_replace_everything(
    models: dict[str, Path], tmp_path: Path, scheme: str
) -> None:
    """Filling the parameters of a running model again gives what loading them anew gives."""
    other = save_tiny(tmp_path / "plain", seed=5)
    path = quantised(other, tmp_path / scheme, scheme)
    running, fresh = load(models[scheme]), load(path)
    expected = fresh.logits(SEQUENCE)
    assert not torch.equal(running.logits(SEQUENCE), expected)
    running.loaded.model.load_state_dict(fresh.loaded.model.state_dict())
    running.loaded.model.finish_loading()
    assert torch.equal(running.logits(SEQUENCE), expected)


def test_what_was_decided_cannot_be_changed(models: dict[str, Path]) -> None:
    loaded = load(models["w8a8"]).loaded
    layer = next(module for module in loaded.model.modules() if isinstance(module, MoELayer))
    decided = layer.decisions
    assert loaded.dispatch[layer.name] == decided
    with pytest.raises(AttributeError):
        decided[0].format = replace(decided[0].format, dtype=DispatchDtype.BF16)
    with pytest.raises(TypeError):
        loaded.dispatch[layer.name] = ()
