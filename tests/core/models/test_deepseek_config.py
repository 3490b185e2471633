"""A configuration is read in every published spelling, and a wrong one is one clear error."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mortise.errors import ModelConfigError
from mortise.models.deepseek_v32.config import DeepseekV32Config

# As published with DeepSeek-V3.2, the sizes made small.
PUBLISHED: dict[str, Any] = {
    "architectures": ["DeepseekV32ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 64,
    "index_head_dim": 32,
    "index_n_heads": 8,
    "index_topk": 16,
    "initializer_range": 0.02,
    "intermediate_size": 96,
    "kv_lora_rank": 32,
    "max_position_embeddings": 512,
    "model_type": "deepseek_v32",
    "moe_intermediate_size": 32,
    "moe_layer_freq": 1,
    "n_group": 2,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts_per_tok": 3,
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 48,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 4,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 128,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "v_head_dim": 24,
    "vocab_size": 272,
}


def changed(**fields: Any) -> dict[str, Any]:
    return {**PUBLISHED, **fields}


def without(*names: str) -> dict[str, Any]:
    return {name: value for name, value in PUBLISHED.items() if name not in names}


def test_the_published_spelling() -> None:
    config = DeepseekV32Config.from_dict(PUBLISHED)
    assert config.has_indexer
    assert config.yarn is not None
    assert config.yarn.factor == 4
    assert config.eos_token_ids == (1,)
    assert [config.is_dense(layer) for layer in range(3)] == [True, False, False]
    assert config.latent_dim == 48


def test_the_spelling_of_transformers_5_means_the_same() -> None:
    scaling = PUBLISHED["rope_scaling"]
    rewritten = without("rope_theta", "rope_scaling", "torch_dtype", "first_k_dense_replace")
    rewritten |= {
        "dtype": "bfloat16",
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "rope_parameters": {
            **{name: value for name, value in scaling.items() if name != "type"},
            "rope_type": "yarn",
            "rope_theta": 10000.0,
        },
    }
    for dropped in ("topk_method", "scoring_func", "moe_layer_freq"):
        del rewritten[dropped]
    assert DeepseekV32Config.from_dict(rewritten) == DeepseekV32Config.from_dict(PUBLISHED)


def test_v3_is_the_same_without_the_indexer() -> None:
    config = DeepseekV32Config.from_dict(changed(model_type="deepseek_v3", q_lora_rank=None))
    assert not config.has_indexer
    assert config.q_lora_rank is None


@pytest.mark.parametrize("scaling", [None, {}, {"type": "default"}, {"rope_type": "default"}])
def test_no_scaling(scaling: dict[str, Any] | None) -> None:
    config = DeepseekV32Config.from_dict(changed(rope_scaling=scaling))
    assert config.yarn is None
    assert config.mla_shape().softmax_scale == pytest.approx(48**-0.5)


def test_a_missing_factor_is_the_ratio_of_the_lengths() -> None:
    scaling = {"type": "yarn", "original_max_position_embeddings": 128}
    config = DeepseekV32Config.from_dict(changed(rope_scaling=scaling))
    assert config.yarn is not None
    assert config.yarn.factor == 4


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (without("hidden_size"), ["hidden_size", "required"]),
        (changed(hidden_size="wide"), ["hidden_size", "'wide'"]),
        (changed(n_group=3), ["n_routed_experts 8", "n_group 3"]),
        (changed(n_group=8), ["two experts"]),
        (changed(topk_group=3), ["topk_group 3", "n_group 2"]),
        (changed(num_experts_per_tok=5), ["num_experts_per_tok 5", "4 experts"]),
        (changed(qk_rope_head_dim=15), ["qk_rope_head_dim 15 is odd"]),
        (changed(index_head_dim=8), ["index_head_dim"]),
        (without("index_topk"), ["index_topk"]),
        (changed(q_lora_rank=None), ["q_lora_rank"]),
        (changed(scoring_func="softmax"), ["scoring_func", "'softmax'"]),
        (changed(topk_method="greedy"), ["topk_method", "'greedy'"]),
        (changed(hidden_act="gelu"), ["hidden_act", "'gelu'"]),
        (changed(moe_layer_freq=2), ["moe_layer_freq"]),
        (changed(rope_theta=0), ["rope_theta"]),
        (changed(rope_scaling={"type": "linear", "factor": 2}), ["'linear'", "yarn"]),
        (changed(rope_scaling="yarn"), ["'yarn'", "a table"]),
        (changed(rope_scaling={"type": "yarn", "factor": 4}), ["original_max_position"]),
        (
            changed(
                rope_scaling={"type": "yarn", "original_max_position_embeddings": 128},
                max_position_embeddings="long",
            ),
            ["max_position_embeddings", "'long'"],
        ),
        (
            changed(
                rope_scaling={
                    "type": "yarn",
                    "factor": -1,
                    "original_max_position_embeddings": 128,
                }
            ),
            ["factor"],
        ),
        (changed(mlp_layer_types=["sparse", "dense", "sparse"]), ["mlp_layer_types", "dense"]),
        (changed(mlp_layer_types=["dense"]), ["mlp_layer_types", "3"]),
    ],
)
def test_a_wrong_value_is_named_beside_what_was_expected(
    raw: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(ModelConfigError) as caught:
        DeepseekV32Config.from_dict(raw)
    for word in words:
        assert word in str(caught.value)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.floats(allow_nan=True)
    | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["type", "rope_type", "factor"]), inner, max_size=3)
    ),
    max_leaves=4,
)
SCALING_FIELDS = sorted({*PUBLISHED["rope_scaling"], "rope_theta", "attention_factor", "truncate"})


@given(st.dictionaries(st.sampled_from(sorted(PUBLISHED)), json_values, min_size=1, max_size=3))
def test_whatever_a_field_holds_the_answer_is_a_configuration_or_our_error(
    fields: dict[str, Any],
) -> None:
    assert_reads_or_refuses(changed(**fields))


@given(
    st.dictionaries(st.sampled_from(SCALING_FIELDS), json_values, min_size=1, max_size=3),
    st.sampled_from(["rope_scaling", "rope_parameters"]),
    st.sampled_from(SCALING_FIELDS),
)
def test_whatever_the_scaling_holds(fields: dict[str, Any], spelling: str, missing: str) -> None:
    scaling = {**PUBLISHED["rope_scaling"], **fields}
    scaling.pop(missing, None)
    assert_reads_or_refuses({**without("rope_scaling"), spelling: scaling})


def assert_reads_or_refuses(raw: dict[str, Any]) -> None:
    try:
        config = DeepseekV32Config.from_dict(json.loads(json.dumps(raw)))
    except ModelConfigError:
        return
    shape = config.mla_shape()
    assert shape.softmax_scale > 0
    assert config.vocab_size > 0
