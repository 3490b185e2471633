"""Qwen3-Next and Qwen3.5 MoE, whole and quantised: emulated chips say what the reference says."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from tests.engine.test_independent_models import quantised
from tests.fixtures.tiny_models import save_tiny
from tests.plugins.test_glm4_moe_on_chips import CHIPS, SCHEMES
from tests.plugins.test_glm_moe_dsa_on_chips import TOKENS, generated, load

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module", params=["qwen3_next", "qwen3_5_moe_text"])
def models(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("hybrid")
    plain = save_tiny(
        folder / "plain",
        model_type=request.param,
        num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
        moe_intermediate_size=64,
        shared_expert_intermediate_size=64,
    )
    return {"plain": plain} | {
        scheme: quantised(plain, folder / scheme, scheme)
        for scheme in ("fp8-block", "nvfp4", "w8a8")
    }


@pytest.mark.parametrize(
    ("chip", "scheme"), [(chip, scheme) for chip, schemes in SCHEMES.items() for scheme in schemes]
)
def test_an_emulated_chip_says_what_the_reference_says(
    models: dict[str, Path], chip: str, scheme: str
) -> None:
    """Up to its own order of summation, which costs less than bfloat16 and the scheme do."""
    llm, reference = load(models[scheme], device="emulated", **CHIPS[chip]), load(models[scheme])
    assert [len(tokens) for tokens in generated(llm)] == [5, 5]
    expected = reference.logits(TOKENS)
    loss = (expected - load(models["plain"], dtype="float32").logits(TOKENS)).abs().mean()
    assert (llm.logits(TOKENS) - expected).abs().mean() < loss
