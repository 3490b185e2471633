"""A GLM-5 configuration is read as transformers reads it, and a wrong one is one clear error."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mortise.errors import ModelConfigError
from mortise.models.glm_moe_dsa.config import GlmMoeDsaConfig

# The fields and their spelling as published with GLM-5, the sizes made small.
PUBLISHED: dict[str, Any] = {
    "architectures": ["GlmMoeDsaForCausalLM"],
    "attention_bias": False,
    "eos_token_id": [254, 255],
    "first_k_dense_replace": 3,
    "head_dim": 48,
    "hidden_act": "silu",
    "hidden_size": 64,
    "index_head_dim": 32,
    "index_n_heads": 8,
    "index_topk": 16,
    "indexer_rope_interleave": True,
    "intermediate_size": 96,
    "kv_lora_rank": 32,
    "max_position_embeddings": 512,
    "model_type": "glm_moe_dsa",
    "moe_intermediate_size": 32,
    "n_group": 1,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts_per_tok": 3,
    "num_hidden_layers": 6,
    "num_key_value_heads": 4,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 48,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "rms_norm_eps": 1e-05,
    "rope_interleave": True,
    "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"},
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "v_head_dim": 24,
    "vocab_size": 272,
}
DEFAULTED = (
    "attention_bias",
    "first_k_dense_replace",
    "n_group",
    "n_shared_experts",
    "norm_topk_prob",
    "num_nextn_predict_layers",
    "rms_norm_eps",
    "routed_scaling_factor",
    "topk_group",
)


def changed(**fields: Any) -> dict[str, Any]:
    return {**PUBLISHED, **fields}


def without(*names: str) -> dict[str, Any]:
    return {name: value for name, value in PUBLISHED.items() if name not in names}


def full_layers(raw: dict[str, Any]) -> list[int]:
    config = GlmMoeDsaConfig.from_dict(raw)
    return [layer for layer in range(config.num_hidden_layers) if config.has_own_indexer(layer)]


def dense_layers(raw: dict[str, Any]) -> list[int]:
    config = GlmMoeDsaConfig.from_dict(raw)
    return [layer for layer in range(config.num_hidden_layers) if config.is_dense(layer)]


def test_the_published_spelling() -> None:
    config = GlmMoeDsaConfig.from_dict(PUBLISHED)
    assert config.eos_token_ids == (254, 255)
    assert config.rope_theta == 1e6
    assert config.yarn is None
    assert config.latent_dim == 48
    assert config.mla_shape().softmax_scale == pytest.approx(48**-0.5)
    assert dense_layers(PUBLISHED) == [0, 1, 2]


@pytest.mark.parametrize("name", DEFAULTED)
def test_what_is_left_out_has_the_value_that_transformers_gives_it(name: str) -> None:
    import transformers

    sizes = {field: value for field, value in PUBLISHED.items() if field not in DEFAULTED}
    theirs = transformers.GlmMoeDsaConfig(**sizes)
    # A field that transformers does not know: as many drafting layers as it reads, which is none.
    assert getattr(GlmMoeDsaConfig.from_dict(sizes), name) == getattr(theirs, name, 0)


SCHEDULES: list[dict[str, Any]] = [
    {},
    {"index_topk_freq": 4},
    {"index_topk_freq": 2, "index_skip_topk_offset": 1},
    {"index_topk_freq": 3, "index_skip_topk_offset": 3},
    {"index_topk_freq": 0},
    {"index_topk_freq": 4, "index_skip_topk_offset": 9},
    {"index_topk_freq": 2, "index_skip_topk_offset": -1},
    {"index_topk_pattern": "FSSFSF"},
    {"index_topk_pattern": ["full", "shared", "full", "shared", "full", "full"]},
    {"index_topk_pattern": None, "index_topk_freq": 2},
    {"indexer_types": ["full"] * 3 + ["shared"] * 3, "index_topk_freq": 2},
    {"mlp_layer_types": ["sparse", "dense", "sparse", "dense", "sparse", "dense"]},
    {"first_k_dense_replace": 9},
]


@pytest.mark.parametrize("fields", SCHEDULES, ids=str)
def test_layers_are_of_the_kinds_that_transformers_makes_them(fields: dict[str, Any]) -> None:
    import transformers

    theirs = transformers.GlmMoeDsaConfig(**changed(**fields))
    kinds, blocks = enumerate(theirs.indexer_types), enumerate(theirs.mlp_layer_types)
    assert full_layers(changed(**fields)) == [layer for layer, kind in kinds if kind == "full"]
    assert dense_layers(changed(**fields)) == [layer for layer, kind in blocks if kind == "dense"]


@pytest.mark.parametrize("name", ["num_experts", "num_local_experts"])
def test_older_names_of_the_number_of_experts(name: str) -> None:
    raw = without("n_routed_experts") | {name: 8}
    assert GlmMoeDsaConfig.from_dict(raw) == GlmMoeDsaConfig.from_dict(PUBLISHED)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (without("q_lora_rank"), ["q_lora_rank", "required"]),
        (changed(q_lora_rank=None), ["q_lora_rank"]),
        (without("index_topk"), ["index_topk", "required"]),
        (without("n_routed_experts"), ["n_routed_experts", "required"]),
        (changed(num_experts=16), ["n_routed_experts: 8", "num_experts: 16"]),
        (changed(index_head_dim=8), ["index_head_dim", "qk_rope_head_dim"]),
        (changed(rope_interleave=False), ["rope_interleave"]),
        (changed(mlp_bias=True), ["mlp_bias"]),
        (changed(scoring_func="softmax"), ["scoring_func", "'softmax'"]),
        (changed(indexer_types=["full", "shared"]), ["indexer_types", "2 entries", "6 layers"]),
        (changed(indexer_types=["full"] * 5 + ["none"]), ["indexer_types", "'none'"]),
        (changed(indexer_types=["shared"] + ["full"] * 5), ["first layer", "indexer_types"]),
        (changed(index_topk_pattern="SFFFFF"), ["first layer"]),
        (changed(index_topk_pattern="FFX"), ["index_topk_pattern", "'FFX'"]),
        (changed(index_topk_freq=3, index_skip_topk_offset=0), ["first layer"]),
        (changed(mlp_layer_types=["dense"]), ["mlp_layer_types", "1 entries"]),
        (changed(mlp_layer_types=["dense"] * 5 + ["wide"]), ["mlp_layer_types", "'wide'"]),
        (changed(rope_parameters={"rope_type": "linear", "factor": 2.0}), ["'linear'", "yarn"]),
        (
            changed(
                rope_parameters={
                    "rope_type": "yarn",
                    "factor": 2.0,
                    "original_max_position_embeddings": 128,
                    "partial_rotary_factor": 0.5,
                }
            ),
            ["partial_rotary_factor 0.5", "qk_rope_head_dim"],
        ),
    ],
)
def test_a_wrong_value_is_named_beside_what_was_expected(
    raw: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(ModelConfigError) as caught:
        GlmMoeDsaConfig.from_dict(raw)
    for word in words:
        assert word in str(caught.value)


FIELDS = sorted(
    {
        *PUBLISHED,
        "indexer_types",
        "index_topk_pattern",
        "index_topk_freq",
        "index_skip_topk_offset",
        "mlp_layer_types",
        "num_experts",
        "num_local_experts",
    }
)
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.floats(allow_nan=True)
    | st.sampled_from(["F", "FSFSFS", "full", "shared", "dense", "sparse", ""]),
    lambda inner: (
        st.lists(inner, max_size=6)
        | st.dictionaries(st.sampled_from(["rope_type", "rope_theta"]), inner, max_size=2)
    ),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from(FIELDS), json_values, min_size=1, max_size=3))
def test_whatever_a_field_holds_the_answer_is_a_configuration_or_our_error(
    fields: dict[str, Any],
) -> None:
    try:
        config = GlmMoeDsaConfig.from_dict(json.loads(json.dumps(changed(**fields))))
    except ModelConfigError:
        return
    assert config.has_own_indexer(0)
    assert config.sharing_layers <= set(range(config.num_hidden_layers))
    assert not config.is_dense(config.num_hidden_layers)
