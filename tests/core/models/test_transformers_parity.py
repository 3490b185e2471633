"""Logits and greedy tokens of random models equal those of transformers, in float32."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tests.fixtures.tiny_models import YARN, save_tiny, tiny_transformers_model

from mortise import LLM, EngineConfig, SamplingParams

if TYPE_CHECKING:
    from pathlib import Path

TOLERANCE = 1e-4
NUM_TOKENS = 80
NEW_TOKENS = 24
PROMPT_LENS = (40, 9, 23)
CHUNK = 17

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "v32": {},
    "v32, more heads, no groups, three dense layers": {
        "num_attention_heads": 8,
        "v_head_dim": 16,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 3,
        "index_topk": 24,
    },
    "v32, four groups, two kept, weights not normalised": {
        "n_group": 4,
        "topk_group": 2,
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
        "first_k_dense_replace": 0,
    },
    "v32, yarn": {"rope_parameters": YARN, "index_topk": 8},
    "v32, another epsilon": {"rms_norm_eps": 0.3, "first_k_dense_replace": 0},
    "v32, yarn of two scales, tied embeddings": {
        "rope_parameters": YARN | {"mscale": 0.7, "factor": 8.0},
        "tie_word_embeddings": True,
        "n_shared_experts": 2,
    },
    "v32, biases, every key seen": {"attention_bias": True, "index_topk": 512},
    # With few index heads most rows of scores are tied at zero where the last key is chosen.
    "v32, four index heads": {"index_n_heads": 4},
    "v32, one index head, wide": {"index_n_heads": 1, "index_head_dim": 64, "index_topk": 12},
    "v3": {"model_type": "deepseek_v3"},
    "v3, no latent query, values wider than keys": {
        "model_type": "deepseek_v3",
        "q_lora_rank": None,
        "v_head_dim": 56,
    },
    "v3, yarn, all layers of experts": {
        "model_type": "deepseek_v3",
        "rope_parameters": YARN | {"mscale_all_dim": 0.5},
        "n_group": 4,
        "topk_group": 2,
        "first_k_dense_replace": 0,
        "n_routed_experts": 16,
        "num_experts_per_tok": 4,
    },
    "v3, halves rotated, biases, tied": {
        "model_type": "deepseek_v3",
        "rope_interleave": False,
        "attention_bias": True,
        "tie_word_embeddings": True,
        "num_attention_heads": 2,
        "n_group": 1,
        "topk_group": 1,
    },
    "glm": {"model_type": "glm_moe_dsa"},
    "glm, as published": {
        "model_type": "glm_moe_dsa",
        "num_hidden_layers": 6,
        "index_topk_freq": 4,
        "index_skip_topk_offset": 3,
        "n_group": 1,
        "topk_group": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 8e6},
        "rms_norm_eps": 1e-2,
        "num_nextn_predict_layers": 1,
    },
    # Few index heads: what is shared are choices among ties.
    "glm, one indexer for all layers": {
        "model_type": "glm_moe_dsa",
        "indexer_types": ["full", "shared", "shared"],
        "index_n_heads": 2,
        "index_topk": 12,
    },
    "glm, by a pattern, a dense layer between": {
        "model_type": "glm_moe_dsa",
        "num_hidden_layers": 4,
        "index_topk_pattern": "FSSF",
        "mlp_layer_types": ["sparse", "dense", "sparse", "dense"],
        "norm_topk_prob": False,
        "n_shared_experts": 2,
    },
    "glm, yarn, biases, tied": {
        "model_type": "glm_moe_dsa",
        "index_topk_freq": 2,
        "rope_parameters": YARN | {"mscale": 0.7},
        "attention_bias": True,
        "tie_word_embeddings": True,
    },
    "glm, everything of the index head rotated, wide values": {
        "model_type": "glm_moe_dsa",
        "indexer_types": ["full", "full", "shared"],
        "index_head_dim": 16,
        "v_head_dim": 56,
        "index_topk": 24,
        "first_k_dense_replace": 0,
    },
    "glm, every key seen": {
        "model_type": "glm_moe_dsa",
        "index_topk": 512,
        "index_topk_freq": 2,
    },
    "glm4": {"model_type": "glm4_moe"},
    "glm4, as published": {
        "model_type": "glm4_moe",
        "num_attention_heads": 12,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "partial_rotary_factor": 0.5,
        },
        "n_routed_experts": 16,
        "num_experts_per_tok": 8,
        "num_nextn_predict_layers": 1,
    },
    "glm4, a head of keys for each of queries, no biases, no norms, tied": {
        "model_type": "glm4_moe",
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "attention_bias": False,
        "use_qk_norm": False,
        "tie_word_embeddings": True,
    },
    "glm4, all of a head rotated, four groups, two kept, weights not normalised": {
        "model_type": "glm4_moe",
        "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 1.0},
        "n_group": 4,
        "topk_group": 2,
        "norm_topk_prob": False,
        "first_k_dense_replace": 0,
    },
    "glm4, a quarter rotated, biases without norms, three shared experts": {
        "model_type": "glm4_moe",
        "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25},
        "use_qk_norm": False,
        "n_shared_experts": 3,
        "first_k_dense_replace": 2,
        "rms_norm_eps": 0.1,
    },
    "glm4, heads wider than the hidden state has room for, norms without biases": {
        "model_type": "glm4_moe",
        "head_dim": 24,
        "num_key_value_heads": 3,
        "attention_bias": False,
        "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.67},
        "n_group": 2,
    },
    "glm4, yarn, tied": {
        "model_type": "glm4_moe",
        "head_dim": 32,
        "rope_parameters": YARN | {"partial_rotary_factor": 0.5, "mscale": 0.0},
        "tie_word_embeddings": True,
    },
    "glm4, dense layers": {"model_type": "glm4_moe", "first_k_dense_replace": 3},
}
SPARSE = [
    name
    for name, fields in CONFIGURATIONS.items()
    if fields.get("model_type") not in {"deepseek_v3", "glm4_moe"}
    and fields.get("index_topk", 16) < NUM_TOKENS
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(params=CONFIGURATIONS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@cache
def theirs(name: str) -> torch.nn.Module:
    return tiny_transformers_model(**CONFIGURATIONS[name])


@cache
def saved(name: str, root: Path) -> Path:
    path = root / str(list(CONFIGURATIONS).index(name))
    return save_tiny(path, tokenizer=False, **CONFIGURATIONS[name])


@cache
def ours(name: str, root: Path, chunk: int = 512) -> LLM:
    return LLM(
        EngineConfig(
            model=str(saved(name, root)),
            dtype="float32",
            cache={"max_num_tokens": 512},
            scheduler={"max_num_batched_tokens": chunk},
        )
    )


@cache
def tokens_of(count: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 256, (count,), generator=torch.Generator().manual_seed(seed))


@cache
@torch.inference_mode()
def their_logits(name: str) -> torch.Tensor:
    return theirs(name)(tokens_of(NUM_TOKENS).unsqueeze(0)).logits[0]


@cache
@torch.inference_mode()
def their_greedy_tokens(name: str) -> list[list[int]]:
    """What transformers generates after each prompt alone."""
    return [
        theirs(name)
        .generate(prompt.unsqueeze(0), max_new_tokens=NEW_TOKENS, do_sample=False)[0, len(prompt) :]
        .tolist()
        for prompt in prompts()
    ]


def prompts() -> list[torch.Tensor]:
    return [tokens_of(length, seed=length) for length in PROMPT_LENS]


def assert_close(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert got.shape == expected.shape
    assert got.dtype == torch.float32
    difference = float((got - expected).abs().max())
    assert difference < TOLERANCE, f"logits differ by {difference}"


def test_logits_are_large_enough_to_differ(name: str) -> None:
    logits = their_logits(name)
    assert logits.abs().max() > 1.0
    # They depend on the position, not on the biases of the last layer alone.
    assert logits.std(dim=0).mean() > 0.2


def test_logits(name: str, root: Path) -> None:
    assert_close(ours(name, root).logits(tokens_of(NUM_TOKENS).tolist()), their_logits(name))


def test_logits_in_chunks(name: str, root: Path) -> None:
    llm = ours(name, root, CHUNK)
    assert_close(llm.logits(tokens_of(NUM_TOKENS).tolist()), their_logits(name))


@pytest.mark.parametrize("chunk", [512, CHUNK])
def test_greedy_tokens_of_a_ragged_batch(name: str, root: Path, chunk: int) -> None:
    """Together here, one by one there."""
    completions = ours(name, root, chunk).generate(
        [prompt.tolist() for prompt in prompts()],
        SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True),
    )
    assert [list(completion.token_ids) for completion in completions] == their_greedy_tokens(name)


@pytest.mark.parametrize("name", SPARSE)
def test_sparsity_bites(name: str) -> None:
    """Where the indexer drops keys, attention to all of them gives other logits."""
    topk = CONFIGURATIONS[name].get("index_topk", 16)
    dense = tiny_transformers_model(**CONFIGURATIONS[name] | {"index_topk": NUM_TOKENS})
    with torch.inference_mode():
        dense_logits = dense(tokens_of(NUM_TOKENS).unsqueeze(0)).logits[0]
    difference = (their_logits(name) - dense_logits).abs().amax(dim=1)
    assert difference[:topk].max() < TOLERANCE
    assert difference[topk:].max() > 0.05


@pytest.mark.parametrize("name", ["v32", "v3", "glm", "glm4, dense layers"])
def test_bfloat16_loses_no_more_than_transformers_bfloat16(name: str, root: Path) -> None:
    """Tokens cannot be compared there: any order of summation gives others."""
    config = EngineConfig(
        model=str(saved(name, root)), dtype="bfloat16", cache={"max_num_tokens": 128}
    )
    tokens = tokens_of(NUM_TOKENS)
    rounded = tiny_transformers_model(**CONFIGURATIONS[name]).to(torch.bfloat16)
    with torch.inference_mode():
        their_loss = rounded(tokens.unsqueeze(0)).logits[0].float() - their_logits(name)
    our_loss = LLM(config).logits(tokens.tolist()) - their_logits(name)
    assert 0 < our_loss.abs().mean() < 1.3 * their_loss.abs().mean()
