"""A configuration is read in every published spelling, and a wrong one is one clear error."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.fixtures.tiny_models import QWEN

from mortise.errors import ModelConfigError
from mortise.models.qwen3_next.config import Qwen3NextConfig
from mortise.models.registry import family_of
from mortise.spec.qkv import QKVLayout

NEXT, MOE_TEXT = "qwen3_next", "qwen3_5_moe_text"

# As published with Qwen3-Next, the sizes made small.
PUBLISHED: dict[str, Any] = {
    "architectures": ["Qwen3NextForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "eos_token_id": 151645,
    "full_attention_interval": 4,
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 48,
    "initializer_range": 0.02,
    "intermediate_size": 56,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 12,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_value_head_dim": 8,
    "max_position_embeddings": 512,
    "mlp_only_layers": [],
    "model_type": "qwen3_next",
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 8,
    "num_key_value_heads": 2,
    "output_router_logits": False,
    "partial_rotary_factor": 0.25,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000000,
    "router_aux_loss_coef": 0.001,
    "shared_expert_intermediate_size": 40,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 272,
}


def changed(**fields: Any) -> dict[str, Any]:
    return {**PUBLISHED, **fields}


def without(*names: str) -> dict[str, Any]:
    return {name: value for name, value in PUBLISHED.items() if name not in names}


def test_the_published_spelling() -> None:
    config = Qwen3NextConfig.from_dict(PUBLISHED)
    assert [index for index in range(8) if not config.is_recurrent(index)] == [3, 7]
    assert [config.place(index) for index in range(8)] == [0, 1, 2, 0, 3, 4, 5, 1]
    assert config.num_recurrent_layers == 6
    assert not any(map(config.is_dense, range(8)))
    assert config.rotary_dim == 4
    assert config.rope_theta == 1e7
    assert config.torch_dtype == "bfloat16"
    assert config.eos_token_ids == (151645,)
    assert config.qkv_shape().layout is QKVLayout.INTERLEAVED


@pytest.mark.parametrize("model_type", [NEXT, MOE_TEXT])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"layer_types": None, "num_hidden_layers": 5, "full_attention_interval": 2},
        {"partial_rotary_factor": 0.5, "rope_theta": 5000.0},
        {"eos_token_id": [256, 257]},
    ],
)
def test_what_transformers_writes_is_what_it_was_given(
    model_type: str, fields: dict[str, Any]
) -> None:
    import transformers

    kind = {NEXT: transformers.Qwen3NextConfig, MOE_TEXT: transformers.Qwen3_5MoeTextConfig}
    given = {**QWEN, **fields, "model_type": model_type}
    if model_type == NEXT:
        given |= {"norm_topk_prob": False, "decoder_sparse_step": 2, "intermediate_size": 56}
    theirs = kind[model_type](**given)
    written = json.loads(theirs.to_json_string(use_diff=False))
    config = Qwen3NextConfig.from_dict(written)
    assert config.layer_types == tuple(theirs.layer_types)
    assert config.norm_topk_prob is (model_type == MOE_TEXT)
    assert config.rotary_dim == int(16 * theirs.rope_parameters["partial_rotary_factor"])
    assert config.rope_theta == theirs.rope_parameters["rope_theta"]
    assert [config.is_dense(index) for index in range(2)] == [model_type == NEXT, False]
    facts = family_of(written).facts(written)
    assert facts.architecture == model_type
    assert facts.num_experts == 6
    assert (facts.index_num_heads, facts.index_head_dim) == (0, 0)


def test_qwen3_5_normalises_weights_and_has_experts_everywhere() -> None:
    """Its configuration has no say in it: transformers reads these fields of Qwen3-Next alone."""
    fields = {"model_type": MOE_TEXT, "norm_topk_prob": False, "decoder_sparse_step": 2}
    config = Qwen3NextConfig.from_dict(changed(**fields, mlp_only_layers=[0]))
    assert config.norm_topk_prob
    assert not any(map(config.is_dense, range(8)))
    assert config.qkv_shape().layout is QKVLayout.CONTIGUOUS


def test_the_positions_of_pictures_do_not_concern_a_text() -> None:
    rope = {
        "mrope_interleaved": True,
        "mrope_section": [11, 11, 10],
        "rope_type": "default",
        "rope_theta": 5000.0,
        "partial_rotary_factor": 0.5,
    }
    config = Qwen3NextConfig.from_dict(changed(model_type=MOE_TEXT, rope_parameters=rope))
    assert (config.rope_theta, config.rotary_dim, config.yarn) == (5000.0, 8, None)


def test_layers_without_experts() -> None:
    config = Qwen3NextConfig.from_dict(changed(decoder_sparse_step=3, mlp_only_layers=[5]))
    assert [index for index in range(8) if not config.is_dense(index)] == [2]


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "missing": (without("num_experts"), "num_experts: Field required"),
    "wrong type": (changed(hidden_size="wide"), r"hidden_size: .* \(got 'wide'\)"),
    "no heads": (changed(linear_num_key_heads=0), "linear_num_key_heads"),
    "heads do not divide": (
        changed(linear_num_value_heads=5),
        "linear_num_value_heads 5 is not a multiple of linear_num_key_heads 2",
    ),
    "query heads do not divide": (
        changed(num_key_value_heads=3),
        "num_attention_heads 4 is not a multiple of num_key_value_heads 3",
    ),
    "too many chosen": (changed(num_experts_per_tok=7), "7 is more than the 6 experts"),
    "a kind of layer": (changed(layer_types=["mamba"] * 8), "layer_types.0"),
    "too few layers": (
        changed(layer_types=["full_attention"] * 3),
        "layer_types has 3 entries for 8 layers",
    ),
    "an interval": (changed(full_attention_interval=0), "full_attention_interval is 0"),
    "no pairs": (changed(partial_rotary_factor=0.2), "rotates 3 of 16 dimensions"),
    "nothing rotated": (changed(partial_rotary_factor=0.01), "rotates 0 of 16 dimensions"),
    "a kind of scaling": (changed(rope_scaling={"type": "linear"}), "rope_scaling type 'linear'"),
    "scaling that is no table": (changed(rope_scaling=2), "rope_scaling is 2"),
    "yarn that shrinks to nothing": (
        changed(rope_scaling={"type": "yarn", "factor": 0, "original_max_position_embeddings": 8}),
        "must be positive",
    ),
    "an activation": (changed(hidden_act="gelu"), "hidden_act"),
    "dense layers of no size": (
        {**without("intermediate_size"), "mlp_only_layers": [1]},
        r"layers \[1\] have no experts: intermediate_size must be given",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_configuration_is_one_clear_error(name: str) -> None:
    raw, message = WRONG[name]
    with pytest.raises(ModelConfigError, match=message):
        family_of(raw).facts(raw)


anything = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 9), st.floats(), st.text(max_size=3), st.just([1])
)


@given(name=st.sampled_from(sorted(set(PUBLISHED) - {"model_type"})), value=anything)
@settings(max_examples=150, deadline=None)
def test_whatever_a_field_holds_the_error_is_ours(name: str, value: object) -> None:
    try:
        Qwen3NextConfig.from_dict(changed(**{name: value}))
    except ModelConfigError as error:
        assert str(error)  # noqa: PT017
