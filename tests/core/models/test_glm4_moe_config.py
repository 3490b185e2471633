"""A GLM-4.x configuration is read in every published spelling, and a wrong one is one error."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mortise.errors import ModelConfigError
from mortise.models.glm4_moe.config import Glm4MoeConfig
from mortise.models.glm4_moe.family import Glm4MoeFamily

# As published with GLM-4.5, the sizes made small.
PUBLISHED: dict[str, Any] = {
    "architectures": ["Glm4MoeForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "eos_token_id": [151329, 151336, 151338],
    "first_k_dense_replace": 3,
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 40,
    "initializer_range": 0.02,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
    "model_type": "glm4_moe",
    "moe_intermediate_size": 32,
    "n_group": 1,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 12,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "num_nextn_predict_layers": 1,
    "pad_token_id": 151329,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "routed_scaling_factor": 2.5,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_qk_norm": True,
    "vocab_size": 151552,
}


def changed(**fields: Any) -> dict[str, Any]:
    return {**PUBLISHED, **fields}


def without(*names: str) -> dict[str, Any]:
    return {name: value for name, value in PUBLISHED.items() if name not in names}


def test_the_published_spelling() -> None:
    config = Glm4MoeConfig.from_dict(PUBLISHED)
    assert config.rotary_dim == 8
    assert config.rope_theta == 1e6
    assert config.yarn is None
    assert config.eos_token_ids == (151329, 151336, 151338)
    assert config.torch_dtype == "bfloat16"
    assert [config.is_dense(layer) for layer in range(4)] == [True, True, True, False]
    shape = config.attention_shape()
    assert (shape.num_attention_heads, shape.num_key_value_heads, shape.head_dim) == (12, 2, 16)
    assert shape.attention_bias
    assert not shape.output_bias
    assert not shape.output_gate


def test_what_the_engine_plans_with() -> None:
    facts = Glm4MoeFamily().facts(PUBLISHED)
    assert facts.architecture == "glm4_moe"
    assert (facts.num_experts, facts.num_experts_per_tok, facts.hidden_size) == (16, 8, 40)
    assert (facts.index_num_heads, facts.index_head_dim) == (0, 0)


def test_the_spelling_of_transformers_5_means_the_same() -> None:
    from transformers import Glm4MoeConfig as Theirs

    rewritten = json.loads(Theirs(**PUBLISHED).to_json_string(use_diff=False))
    assert "rope_theta" not in rewritten
    assert rewritten["rope_parameters"]["partial_rotary_factor"] == 0.5
    assert Glm4MoeConfig.from_dict(rewritten) == Glm4MoeConfig.from_dict(PUBLISHED)


@pytest.mark.parametrize(
    "rotary",
    [
        {},
        {"rope_theta": 5000.0, "partial_rotary_factor": 0.25},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 300.0}},
        {
            "rope_parameters": {"rope_theta": 300.0, "partial_rotary_factor": 1.0},
            "partial_rotary_factor": 0.25,
            "rope_theta": 5.0,
        },
        {
            "rope_scaling": {
                "type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 128,
            },
            "rope_theta": 700.0,
        },
    ],
)
def test_rotary_fields_mean_what_transformers_takes_them_for(rotary: dict[str, Any]) -> None:
    from transformers import Glm4MoeConfig as Theirs

    raw = without("rope_theta", "rope_scaling", "partial_rotary_factor") | rotary
    ours = Glm4MoeConfig.from_dict(json.loads(json.dumps(raw)))
    theirs = Theirs(**raw).rope_parameters
    assert ours.rope_theta == theirs["rope_theta"]
    assert ours.partial_rotary_factor == theirs["partial_rotary_factor"]
    assert (ours.yarn is not None) == (theirs["rope_type"] == "yarn")


@pytest.mark.parametrize("raw", [without("head_dim"), changed(head_dim=None)])
def test_a_head_dimension_that_is_not_given_divides_the_hidden_size(raw: dict[str, Any]) -> None:
    assert Glm4MoeConfig.from_dict({**raw, "hidden_size": 96}).head_dim == 8


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (without("num_key_value_heads"), ["num_key_value_heads", "required"]),
        (changed(num_key_value_heads=5), ["num_attention_heads 12", "num_key_value_heads 5"]),
        (changed(num_key_value_heads=0), ["num_key_value_heads", "greater than 0"]),
        (changed(num_attention_heads=0), ["num_attention_heads", "greater than 0"]),
        (changed(num_attention_heads=0, head_dim=None), ["num_attention_heads"]),
        (changed(head_dim="wide"), ["head_dim", "'wide'"]),
        (changed(head_dim=None, hidden_size=8), ["head_dim", "got 0"]),
        (changed(partial_rotary_factor=0), ["partial_rotary_factor", "greater than 0"]),
        (changed(partial_rotary_factor=1.5), ["partial_rotary_factor", "1.5"]),
        (changed(partial_rotary_factor=0.2), ["partial_rotary_factor 0.2", "3 dimensions"]),
        (changed(partial_rotary_factor=0.01), ["0 dimensions"]),
        (
            changed(rope_parameters={"rope_type": "default", "partial_rotary_factor": "half"}),
            ["partial_rotary_factor", "'half'"],
        ),
        (changed(rope_scaling={"type": "linear", "factor": 2}), ["'linear'", "yarn"]),
        (changed(rope_scaling="yarn"), ["'yarn'", "a table"]),
        (changed(rope_scaling={"type": "yarn", "factor": 4}), ["original_max_position"]),
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
        (changed(rope_theta=0), ["rope_theta"]),
        (changed(n_group=3), ["n_routed_experts 16", "n_group 3"]),
        (changed(n_group=16), ["two experts"]),
        (changed(topk_group=3), ["topk_group 3", "n_group 1"]),
        (changed(num_experts_per_tok=17), ["num_experts_per_tok 17", "16 experts"]),
        (changed(scoring_func="softmax"), ["scoring_func", "'softmax'"]),
        (changed(hidden_act="gelu"), ["hidden_act", "'gelu'"]),
        (changed(use_qk_norm="sometimes"), ["use_qk_norm", "'sometimes'"]),
        (changed(model_type="glm4_moe_lite"), ["glm4_moe"]),
    ],
)
def test_a_wrong_value_is_named_beside_what_was_expected(
    raw: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(ModelConfigError) as caught:
        Glm4MoeConfig.from_dict(raw)
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
        | st.dictionaries(
            st.sampled_from(["rope_type", "factor", "partial_rotary_factor", "rope_theta"]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=4,
)


@given(
    st.dictionaries(
        st.sampled_from([*sorted(PUBLISHED), "rope_parameters"]),
        json_values,
        min_size=1,
        max_size=3,
    )
)
def test_whatever_a_field_holds_the_answer_is_a_configuration_or_our_error(
    fields: dict[str, Any],
) -> None:
    try:
        config = Glm4MoeConfig.from_dict(json.loads(json.dumps(changed(**fields))))
    except ModelConfigError:
        return
    assert config.rotary_dim % 2 == 0
    assert 0 < config.rotary_dim <= config.head_dim
    assert config.num_attention_heads % config.num_key_value_heads == 0
