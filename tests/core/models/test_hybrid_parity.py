"""Logits and greedy tokens of random hybrid models equal those of transformers, in float32."""

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

NEXT, MOE_TEXT = "qwen3_next", "qwen3_5_moe_text"
DELTA_THEN_ATTENTION = ["linear_attention", "full_attention"]
YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
    "partial_rotary_factor": 0.5,
}
SIZES: dict[str, dict[str, Any]] = {
    "two value heads a key head": {},
    "as many value heads as key heads, one in four layers attends": {
        "layer_types": None,
        "linear_num_value_heads": 2,
        "partial_rotary_factor": 0.5,
        "num_key_value_heads": 1,
    },
    "three value heads a key head, biases": {
        "num_hidden_layers": 2,
        "layer_types": DELTA_THEN_ATTENTION,
        "linear_num_value_heads": 6,
        "attention_bias": True,
        "num_key_value_heads": 4,
    },
    "four value heads a key head, tied": {
        "num_hidden_layers": 3,
        "layer_types": [*DELTA_THEN_ATTENTION, "linear_attention"],
        "linear_num_value_heads": 8,
        "tie_word_embeddings": True,
        "num_experts_per_tok": 4,
    },
    "eight value heads of one key head, short convolution": {
        "num_hidden_layers": 2,
        "layer_types": DELTA_THEN_ATTENTION,
        "linear_num_key_heads": 1,
        "linear_num_value_heads": 8,
        "linear_conv_kernel_dim": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 20,
    },
    "yarn, all of a head's pairs but some": {
        "num_hidden_layers": 2,
        "layer_types": DELTA_THEN_ATTENTION,
        "rope_parameters": YARN,
    },
    "attention last, large epsilon": {
        "num_hidden_layers": 3,
        "layer_types": ["linear_attention", *DELTA_THEN_ATTENTION],
        "rms_norm_eps": 1e-3,
        "seed": 1,
    },
    "attention alone": {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2},
}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    f"{model_type}, {name}": {"model_type": model_type, **fields}
    for model_type in (NEXT, MOE_TEXT)
    for name, fields in SIZES.items()
} | {
    "qwen3_next, weights not normalised": {"model_type": NEXT, "norm_topk_prob": False},
    "qwen3_next, dense layers by step and by list": {
        "model_type": NEXT,
        "decoder_sparse_step": 2,
        "mlp_only_layers": [3],
        "intermediate_size": 56,
    },
}
ORDINARY = [f"{model_type}, two value heads a key head" for model_type in (NEXT, MOE_TEXT)]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Pairs:
    return Pairs(
        CONFIGURATIONS,
        tmp_path_factory.mktemp("models"),
        num_tokens=140,  # more than two chunks of the delta rule
        prompt_lens=(70, 1, 23),
        new_tokens=20,
    )


@pytest.fixture(params=CONFIGURATIONS)
def pair(request: pytest.FixtureRequest, pairs: Pairs) -> Pair:
    return pairs[request.param]


class TestParity(ParityTests):
    """Every configuration."""


def test_every_head_ratio_is_there() -> None:
    ratios = {
        fields.get("linear_num_value_heads", 4) // fields.get("linear_num_key_heads", 2)
        for fields in SIZES.values()
    }
    assert ratios == {1, 2, 3, 4, 8}


def test_no_expert_is_chosen_by_a_hair(pair: Pair) -> None:
    """Rounding would choose another one here than there; then the model needs another seed."""
    with torch.inference_mode():
        outputs = pair.theirs(pair.tokens.unsqueeze(0), output_router_logits=True)
    chosen = pair.theirs.config.num_experts_per_tok
    for logits in outputs.router_logits:
        best = logits.softmax(dim=-1).sort(dim=-1, descending=True).values
        assert (best[:, chosen - 1] - best[:, chosen]).min() > 1e-5


@pytest.mark.parametrize("pair", ORDINARY, indirect=True)
def test_the_first_token_reaches_the_last_logits(pair: Pair) -> None:
    """Otherwise a state that is lost on the way would not be noticed."""
    tokens = pair.tokens.clone()
    tokens[0] = (tokens[0] + 1) % 256
    changed = pair.their_logits_of(tokens)
    assert (changed[-1] - pair.their_logits[-1]).abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize("pair", ORDINARY, indirect=True)
def test_bfloat16_loses_no_more_than_transformers_bfloat16(pair: Pair) -> None:
    assert_bfloat16_loses_no_more(pair)
