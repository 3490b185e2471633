"""GLM-5 with layers that share keys: quantised copies load, and emulated chips say the same."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from tests.engine.test_independent_models import quantised
from tests.fixtures.fp8_models import save_fp8
from tests.fixtures.tiny_models import save_tiny

from mortise import LLM, EngineConfig, SamplingParams
from mortise.errors import BackendUnusableError

if TYPE_CHECKING:
    from pathlib import Path

TOKENS = torch.randint(0, 256, (40,), generator=torch.Generator().manual_seed(1)).tolist()
PROMPTS = [TOKENS[:30], TOKENS[:9]]
SHARED: dict[str, Any] = {
    "model_type": "glm_moe_dsa",
    "indexer_types": ["full", "shared", "full"],
}
CHIPS: dict[str, dict[str, Any]] = {
    "Hopper": {"backend": "cuda_hopper"},
    "A2": {"backend": "npu_ascend", "backend_options": {"npu_ascend": {"generation": "A2"}}},
    "A3": {"backend": "npu_ascend", "backend_options": {"npu_ascend": {"generation": "A3"}}},
}
SCHEMES = {"Hopper": ("plain", "fp8-block"), "A2": ("plain", "w8a8"), "A3": ("plain", "w8a8")}
"""What each chip serves; an Ascend of these generations has no float8."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("glm")
    plain = save_tiny(folder / "plain", hidden_size=64, moe_intermediate_size=64, **SHARED)
    return {"plain": plain} | {
        scheme: quantised(plain, folder / scheme, scheme) for scheme in ("fp8-block", "w8a8")
    }


def load(path: Path, *, dtype: str = "bfloat16", **settings: Any) -> LLM:
    return LLM(
        EngineConfig(
            model=str(path),
            dtype=dtype,
            # Keys rounded to float8 would be other keys, and hide what is compared here.
            index_key_dtype="compute",
            cache={"max_num_tokens": 256},
            **settings,
        )
    )


def generated(llm: LLM) -> list[tuple[int, ...]]:
    sampling = SamplingParams(max_tokens=5, ignore_eos=True)
    return [one.token_ids for one in llm.generate(PROMPTS, sampling)]


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


@pytest.mark.parametrize("chip", ["A2", "A3"])
def test_a_chip_without_float8_says_so(models: dict[str, Path], chip: str) -> None:
    with pytest.raises(BackendUnusableError, match=r"q_a_proj: its weight is stored as fp8_block"):
        load(models["fp8-block"], device="emulated", **CHIPS[chip])


def test_float8_blocks_that_transformers_saved(tmp_path: Path) -> None:
    save_fp8(tmp_path / "quantised", tmp_path / "original", **SHARED)
    exact = load(tmp_path / "original", dtype="float32").logits(TOKENS)
    llm = load(tmp_path / "quantised", dtype="float32")
    assert [len(tokens) for tokens in generated(llm)] == [5, 5]
    assert 0 < (llm.logits(TOKENS) - exact).abs().mean() < 0.5 * exact.std()


@pytest.mark.parametrize("scheme", ["fp8-block", "w8a8"])
def test_a_quantised_copy_stays_near_the_model(models: dict[str, Path], scheme: str) -> None:
    exact = load(models["plain"], dtype="float32").logits(TOKENS)
    llm = load(models[scheme], dtype="float32")
    assert [len(tokens) for tokens in generated(llm)] == [5, 5]
    assert 0 < (llm.logits(TOKENS) - exact).abs().mean() < 0.5 * exact.std()
