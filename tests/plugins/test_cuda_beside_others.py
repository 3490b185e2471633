"""Models on emulated NVIDIA chips of both kinds, in several schemes, leave each other alone."""

from __future__ import annotations

from itertools import permutations
from typing import TYPE_CHECKING

import pytest
import torch
from tests.engine.test_independent_models import quantised, run
from tests.fixtures.tiny_models import save_tiny

from mortise import LLM, EngineConfig

if TYPE_CHECKING:
    from pathlib import Path

PAIRS = {
    "fp8-block": "cuda_hopper",
    "w4a16": "cuda_hopper",
    "nvfp4": "cuda_blackwell",
}
"""Each with the backend that it runs on here; the unquantised model runs on a Hopper."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny model, and what became of it in each scheme."""
    folder = tmp_path_factory.mktemp("cuda")
    plain = save_tiny(folder / "plain", hidden_size=64, moe_intermediate_size=64)
    return {"plain": plain} | {
        scheme: quantised(plain, folder / scheme, scheme) for scheme in PAIRS
    }


def load(path: Path, backend: str) -> LLM:
    return LLM(
        EngineConfig(
            model=str(path),
            backend=backend,
            device="emulated",
            dtype="bfloat16",
            cache={"max_num_tokens": 256},
        )
    )


@pytest.mark.parametrize("scheme", PAIRS)
def test_a_quantised_and_an_unquantised_model_interleave_bit_identically(
    models: dict[str, Path], scheme: str
) -> None:
    backends = {"plain": "cuda_hopper", scheme: PAIRS[scheme]}
    alone = {name: run([load(models[name], backends[name])])[0] for name in backends}
    for order in permutations(backends):
        together = run([load(models[name], backends[name]) for name in order])
        for name, (tokens, logits) in zip(order, together, strict=True):
            assert tokens == alone[name][0], f"{name} of {order}"
            assert torch.equal(logits, alone[name][1]), f"{name} of {order}"
