"""Models and engines of other shapes draft as exactly: few prompts of each."""

from __future__ import annotations

from functools import reduce
from operator import add
from typing import TYPE_CHECKING, Any

import pytest

from mortise import SamplingParams
from tests.fixtures.drafted_models import drafting, held_out_prompts, save_drafted, tokens_of
from tests.fixtures.tiny_models import YARN

if TYPE_CHECKING:
    from pathlib import Path

GREEDY = SamplingParams(max_tokens=18, ignore_eos=True)
SOMETIMES = 0.2
"""A share of chance; without it drafts of models that say two tokens in turn are always right."""
MODELS: dict[str, dict[str, Any]] = {
    "v3, yarn": {"model_type": "deepseek_v3", "rope_parameters": YARN},
    "v3, one layer, tied": {
        "model_type": "deepseek_v3",
        "num_hidden_layers": 1,
        "first_k_dense_replace": 0,
        "tie_word_embeddings": True,
        "chance": SOMETIMES,
    },
    "v32, four keys": {"model_type": "deepseek_v32", "index_topk": 4},
    "glm, shared keys": {
        "model_type": "glm_moe_dsa",
        "indexer_types": ["full", "shared", "full"],
    },
    "glm4, neither bias nor norms": {
        "model_type": "glm4_moe",
        "attention_bias": False,
        "use_qk_norm": False,
        "num_key_value_heads": 3,
    },
    "qwen3_next, three delta nets, wide heads": {
        "model_type": "qwen3_next",
        "layer_types": ["linear_attention"] * 3 + ["full_attention"],
        "linear_num_value_heads": 8,
        "linear_conv_kernel_dim": 3,
    },
    "qwen3_next, tied": {
        "model_type": "qwen3_next",
        "tie_word_embeddings": True,
        "chance": SOMETIMES,
    },
    "qwen3.5, one head each": {
        "model_type": "qwen3_5_moe_text",
        "linear_num_key_heads": 4,
        "num_key_value_heads": 1,
    },
}
ENGINES: dict[str, tuple[int, dict[str, Any]]] = {
    "the most drafts there may be": (16, {}),
    "more rows than a prompt's chunk": (8, {"chunk": 7, "seqs": 6}),
    "one page each": (5, {"pages": 3, "seqs": 3, "chunk": 64}),
    "keys in float8": (3, {"index_key_dtype": "fp8"}),
}


def check(path: Path, num_drafts: int, **settings: Any) -> None:
    """Drafting changes nothing, and some drafts are right and some wrong."""
    shared = {name: settings[name] for name in ("index_key_dtype",) if name in settings}
    plain = drafting(path, **shared)
    prompts = [prompt[:44] for prompt in held_out_prompts(plain.tokenizer, 28)]
    llm = drafting(path, num_drafts, **settings)
    found = llm.generate(prompts, GREEDY)
    assert tokens_of(found) == tokens_of(plain.generate(prompts, GREEDY))
    total = reduce(add, [one.drafting for one in found if one.drafting is not None])
    assert 0.1 * total.drafted < total.accepted < total.drafted
    llm._engine.scheduler.check_integrity()


@pytest.mark.parametrize("name", MODELS)
def test_models(name: str, tmp_path: Path) -> None:
    check(save_drafted(tmp_path / "model", **MODELS[name]), 3)


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("model_type", ["deepseek_v32", "qwen3_next"])
def test_engines(name: str, model_type: str, tmp_path: Path) -> None:
    num_drafts, settings = ENGINES[name]
    check(save_drafted(tmp_path / "model", model_type=model_type), num_drafts, **settings)
