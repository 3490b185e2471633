"""A directory with a model of texts and pictures, as transformers saves it, is read for texts."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
from tests.fixtures.tiny_models import BASES, tiny_transformers_model

from mortise import LLM, EngineConfig, SamplingParams
from mortise.errors import ModelConfigError
from mortise.models.registry import family_of

if TYPE_CHECKING:
    from pathlib import Path

TOKENS = torch.randint(0, 256, (100,), generator=torch.Generator().manual_seed(1))
VISION = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "num_position_embeddings": 16,
    "out_hidden_size": 64,
}


@pytest.fixture(scope="module")
def theirs() -> torch.nn.Module:
    """The text model inside has the weights of the tiny one, which make every weight matter."""
    import transformers

    texts = tiny_transformers_model(model_type="qwen3_5_moe_text")
    config = transformers.Qwen3_5MoeConfig(
        text_config=BASES["qwen3_5_moe_text"], vision_config=VISION
    )
    whole = transformers.Qwen3_5MoeForConditionalGeneration(config).eval()
    whole.model.language_model.load_state_dict(texts.model.state_dict())
    whole.lm_head.load_state_dict(texts.lm_head.state_dict())
    whole.generation_config.eos_token_id = None
    return whole


@pytest.fixture(scope="module")
def model(theirs: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole")
    theirs.save_pretrained(path)
    return path


def test_logits_and_tokens(theirs: torch.nn.Module, model: Path) -> None:
    llm = LLM(EngineConfig(model=model, dtype="float32"))
    with torch.inference_mode():
        expected = theirs(TOKENS.unsqueeze(0)).logits[0]
        tokens = theirs.generate(TOKENS.unsqueeze(0), max_new_tokens=12, do_sample=False)
    assert (llm.logits(TOKENS.tolist()) - expected).abs().max() < 1e-4
    sampling = SamplingParams(max_tokens=12, ignore_eos=True)
    (completion,) = llm.generate([TOKENS.tolist()], sampling)
    assert list(completion.token_ids) == tokens[0, len(TOKENS) :].tolist()


def test_what_sees_pictures_is_left_with_the_reason(model: Path) -> None:
    llm = LLM(EngineConfig(model=model, dtype="float32"))
    (decision,) = [one for one in llm.decisions if one.subject == "weights"]
    assert decision.rule == "skip"
    assert decision.reason == "sees pictures; texts alone are read"


def test_what_ends_a_text_is_read_from_the_text_model(model: Path) -> None:
    raw = json.loads((model / "config.json").read_text())
    assert "eos_token_id" not in raw
    assert family_of(raw).facts(raw).eos_token_ids == (257,)
    llm = LLM(EngineConfig(model=model, dtype="float32"))
    assert llm._engine._eos_token_ids == {257}


@pytest.mark.parametrize("texts", [None, [1], "qwen3_5_moe_text"])
def test_a_text_model_that_is_no_table(texts: object) -> None:
    raw = {"model_type": "qwen3_5_moe", "text_config": texts}
    with pytest.raises(ModelConfigError, match="text_config is"):
        family_of(raw).facts(raw)
