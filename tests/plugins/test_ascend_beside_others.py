"""Models on emulated Ascends of several generations and schemes change nothing of each other."""

from __future__ import annotations

from itertools import permutations
from typing import TYPE_CHECKING

import pytest
import torch
from tests.engine.test_independent_models import PROMPTS, quantised, run
from tests.fixtures.tiny_models import save_tiny

from mortise import LLM, EngineConfig, SamplingParams
from mortise.spec.dispatch import DispatchDtype

if TYPE_CHECKING:
    from pathlib import Path

SCHEMES = {"w8a8": "A2", "w4a8": "A3", "w4a4": "A2", "w4a16": "A5"}
"""Each with the generation it runs on here; the unquantised model runs on an A2."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny model, and what became of it in each scheme."""
    folder = tmp_path_factory.mktemp("ascend")
    plain = save_tiny(folder / "plain", hidden_size=64, moe_intermediate_size=64)
    return {"plain": plain} | {
        scheme: quantised(plain, folder / scheme, scheme) for scheme in SCHEMES
    }


def load(path: Path, generation: str) -> LLM:
    return LLM(
        EngineConfig(
            model=str(path),
            backend="npu_ascend",
            device="emulated",
            dtype="bfloat16",
            cache={"max_num_tokens": 256},
            backend_options={"npu_ascend": {"generation": generation}},
        )
    )


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_quantised_and_an_unquantised_model_interleave_bit_identically(
    models: dict[str, Path], scheme: str
) -> None:
    generations = {"plain": "A2", scheme: SCHEMES[scheme]}
    alone = {name: run([load(models[name], generations[name])])[0] for name in generations}
    for order in permutations(generations):
        together = run([load(models[name], generations[name]) for name in order])
        for name, (tokens, logits) in zip(order, together, strict=True):
            assert tokens == alone[name][0], f"{name} of {order}"
            assert torch.equal(logits, alone[name][1]), f"{name} of {order}"


def test_the_one_sends_int8_and_the_other_bf16(models: dict[str, Path]) -> None:
    llms = {name: load(models[name], "A2") for name in ("w8a8", "plain")}
    for llm in llms.values():
        llm.generate(list(PROMPTS), SamplingParams(max_tokens=2, ignore_eos=True))
    sent = {
        name: {one.format.dtype for decisions in llm.loaded.dispatch.values() for one in decisions}
        for name, llm in llms.items()
    }
    assert sent == {"w8a8": {DispatchDtype.INT8}, "plain": {DispatchDtype.BF16}}
