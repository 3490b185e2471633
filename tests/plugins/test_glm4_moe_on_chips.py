"""GLM-4.x, whole and quantised: emulated chips say what the reference says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from tests.engine.test_independent_models import quantised
from tests.fixtures.tiny_models import save_tiny
from tests.plugins.test_glm_moe_dsa_on_chips import TOKENS, generated, load

if TYPE_CHECKING:
    from pathlib import Path

CHIPS: dict[str, dict[str, Any]] = {
    "Hopper": {"backend": "cuda_hopper"},
    "Blackwell": {"backend": "cuda_blackwell"},
    "A2": {"backend": "npu_ascend", "backend_options": {"npu_ascend": {"generation": "A2"}}},
    "A3": {"backend": "npu_ascend", "backend_options": {"npu_ascend": {"generation": "A3"}}},
}
SCHEMES = {
    "Hopper": ("plain", "fp8-block"),
    "Blackwell": ("plain", "nvfp4"),
    "A2": ("plain", "w8a8"),
    "A3": ("plain", "w8a8"),
}
"""What each chip serves."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("glm4")
    plain = save_tiny(folder / "plain", model_type="glm4_moe", moe_intermediate_size=64)
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
