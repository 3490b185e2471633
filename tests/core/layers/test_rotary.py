"""Frequencies and rotations are transformers', plain and stretched by YaRN."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mortise.layers.rotary import RotaryEmbedding, Rotation, YarnScaling, inverse_frequencies
from mortise.models.deepseek_v32.config import DeepseekV32Config


def their_config(dim: int, parameters: dict[str, Any]) -> Any:
    from transformers import DeepseekV3Config

    return DeepseekV3Config(
        qk_rope_head_dim=dim, max_position_embeddings=4096, rope_parameters=parameters
    )


def theirs(dim: int, parameters: dict[str, Any]) -> tuple[torch.Tensor, float]:
    """Frequencies and the factor on cosine and sine."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RotaryEmbedding

    config = their_config(dim, parameters)
    kind = parameters["rope_type"]
    if kind == "default":
        return DeepseekV3RotaryEmbedding.compute_default_rope_parameters(config)
    return ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))


dims = st.sampled_from([2, 8, 16, 64])
thetas = st.sampled_from([100.0, 10000.0, 1000000.0])
yarns = st.fixed_dictionaries(
    {
        "factor": st.sampled_from([1.0, 4.0, 40.0]),
        "original_max_position_embeddings": st.sampled_from([64, 512, 4096]),
    },
    optional={
        "beta_fast": st.sampled_from([16.0, 32.0]),
        "beta_slow": st.sampled_from([1.0, 2.0]),
        "mscale": st.sampled_from([0.0, 0.7, 1.0]),
        "mscale_all_dim": st.sampled_from([0.0, 0.5, 1.0]),
        "attention_factor": st.sampled_from([0.9, 1.3]),
        "truncate": st.booleans(),
    },
)


@given(dims, thetas)
def test_plain_frequencies(dim: int, theta: float) -> None:
    wanted, factor = theirs(dim, {"rope_type": "default", "rope_theta": theta})
    assert factor == 1.0
    torch.testing.assert_close(inverse_frequencies(dim, theta, None), wanted)


@given(dims, thetas, yarns)
def test_stretched_frequencies(dim: int, theta: float, fields: dict[str, Any]) -> None:
    wanted, factor = theirs(dim, {"rope_type": "yarn", "rope_theta": theta, **fields})
    yarn = YarnScaling(**fields)
    torch.testing.assert_close(inverse_frequencies(dim, theta, yarn), wanted)
    assert yarn.rotary_scale == pytest.approx(factor)


@given(yarns)
def test_the_softmax_scale_of_attention(fields: dict[str, Any]) -> None:
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

    config = their_config(8, {"rope_type": "yarn", "rope_theta": 10000.0, **fields})
    config.hidden_size, config.q_lora_rank, config.kv_lora_rank = 8, 8, 8
    attention = DeepseekV3Attention(config, layer_idx=0)
    scale = attention.scaling * attention.qk_head_dim**0.5
    assert YarnScaling(**fields).softmax_scale == pytest.approx(scale)


@given(dims, st.integers(1, 3), st.booleans())
def test_rotations_are_transformers(dim: int, heads: int, interleaved: bool) -> None:
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as module

    num_tokens = 7
    generator = torch.Generator().manual_seed(dim)
    positions = torch.tensor([0, 5, 1, 90, 99, 2, 2])
    x = torch.randn(num_tokens, heads, dim, generator=generator)
    angles = positions[:, None] * inverse_frequencies(dim, 10000.0, None)
    cos, sin = (torch.cat([f(angles)] * 2, dim=-1).unsqueeze(0) for f in (torch.cos, torch.sin))
    rotate = module.apply_rotary_pos_emb_interleave if interleaved else module.apply_rotary_pos_emb
    wanted, _ = rotate(x.transpose(0, 1).unsqueeze(0), x.transpose(0, 1).unsqueeze(0), cos, sin)
    rotation = RotaryEmbedding(dim, 10000.0, 100, None)(positions)
    got = rotation.interleaved(x) if interleaved else rotation.halves(x)
    torch.testing.assert_close(got, wanted[0].transpose(0, 1))
    single = rotation.interleaved(x[:, 0]) if interleaved else rotation.halves(x[:, 0])
    assert torch.equal(single, got[:, 0])


def rotation_at(position: int, dim: int = 6) -> Rotation:
    return RotaryEmbedding(dim, 10000.0, 64, None)(torch.tensor([position]))


@given(st.integers(0, 30), st.integers(0, 30), st.integers(0, 30), st.booleans())
def test_products_depend_on_the_distance_alone(
    first: int, second: int, shift: int, interleaved: bool
) -> None:
    generator = torch.Generator().manual_seed(first)
    query, key = torch.randn(2, 1, 6, generator=generator)

    def product(query_position: int, key_position: int) -> float:
        rotations = (rotation_at(query_position), rotation_at(key_position))
        rotated = [
            rotation.interleaved(x) if interleaved else rotation.halves(x)
            for rotation, x in zip(rotations, (query, key), strict=True)
        ]
        return float((rotated[0] * rotated[1]).sum())

    assert product(first, second) == pytest.approx(product(first + shift, second + shift), abs=1e-4)


def test_interleaved_and_halves_rotate_the_same_pairs_in_another_order() -> None:
    x = torch.arange(8.0).unsqueeze(0)
    rotation = rotation_at(3, dim=8)
    reordered = torch.cat([x[:, 0::2], x[:, 1::2]], dim=-1)
    assert torch.equal(rotation.interleaved(x), rotation.halves(reordered))
    assert not torch.allclose(rotation.interleaved(x), rotation.halves(x))


def test_the_first_position_is_not_rotated() -> None:
    x = torch.randn(1, 2, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(rotation_at(0).halves(x), x)


@pytest.mark.parametrize("num_tokens", [0, 1])
def test_no_token_and_one(num_tokens: int) -> None:
    rotation = RotaryEmbedding(4, 10000.0, 8, None)(torch.zeros(num_tokens, dtype=torch.int64))
    for shape in ((num_tokens, 4), (num_tokens, 3, 4)):
        assert rotation.halves(torch.zeros(shape)).shape == shape
        assert rotation.interleaved(torch.zeros(shape)).shape == shape


def test_bfloat16_stays_bfloat16() -> None:
    x = torch.ones(1, 2, 6, dtype=torch.bfloat16)
    assert rotation_at(5).halves(x).dtype == torch.bfloat16


def test_far_positions_keep_their_angle() -> None:
    """The table of a long context is as exact as float32 angles allow."""
    position = 163_839
    rotation = RotaryEmbedding(64, 10000.0, position + 1, None)(torch.tensor([position]))
    angles = position * inverse_frequencies(64, 10000.0, None).double().numpy()
    np.testing.assert_allclose(rotation.cos[0, :32].numpy(), np.cos(angles), atol=1e-2)


@pytest.mark.parametrize("field", ["rope_scaling", "rope_parameters"])
def test_both_spellings_of_a_configuration_give_the_same_scaling(field: str) -> None:
    fields = {"factor": 40, "original_max_position_embeddings": 4096, "mscale": 1.0}
    fields["mscale_all_dim"] = 1.0
    raw: dict[str, Any] = {
        "model_type": "deepseek_v3",
        "vocab_size": 8,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "max_position_embeddings": 163840,
        "intermediate_size": 8,
        "moe_intermediate_size": 8,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "num_attention_heads": 2,
        "kv_lora_rank": 8,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
    }
    if field == "rope_scaling":
        raw |= {"rope_theta": 50000, "rope_scaling": {"type": "yarn", **fields}}
    else:
        raw |= {"rope_parameters": {"rope_type": "yarn", "rope_theta": 50000, **fields}}
    config = DeepseekV32Config.from_dict(raw)
    assert config.rope_theta == 50000
    assert config.yarn == YarnScaling(**fields)
