"""Logits and greedy tokens of random models equal those of transformers, in float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.fixtures.parity import (
    TOLERANCE,
    Pair,
    Pairs,
    ParityTests,
    assert_bfloat16_loses_no_more,
)
from tests.fixtures.tiny_models import YARN, tiny_transformers_model

NUM_TOKENS = 80

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
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Pairs:
    return Pairs(
        CONFIGURATIONS,
        tmp_path_factory.mktemp("models"),
        num_tokens=NUM_TOKENS,
        prompt_lens=(40, 9, 23),
        new_tokens=24,
    )


@pytest.fixture(params=CONFIGURATIONS)
def pair(request: pytest.FixtureRequest, pairs: Pairs) -> Pair:
    return pairs[request.param]


class TestParity(ParityTests):
    """Every configuration."""


@pytest.mark.parametrize("pair", SPARSE, indirect=True)
def test_sparsity_bites(pair: Pair) -> None:
    """Where the indexer drops keys, attention to all of them gives other logits."""
    topk = pair.fields.get("index_topk", 16)
    dense = tiny_transformers_model(**pair.fields | {"index_topk": NUM_TOKENS})
    with torch.inference_mode():
        dense_logits = dense(pair.tokens.unsqueeze(0)).logits[0]
    difference = (pair.their_logits - dense_logits).abs().amax(dim=1)
    assert difference[:topk].max() < TOLERANCE
    assert difference[topk:].max() > 0.05


@pytest.mark.parametrize("pair", ["v32", "v3", "glm", "glm4, dense layers"], indirect=True)
def test_bfloat16_loses_no_more_than_transformers_bfloat16(pair: Pair) -> None:
    assert_bfloat16_loses_no_more(pair)
