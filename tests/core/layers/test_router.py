"""The routers choose transformers' experts with transformers' weights."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mortise.layers.router import GroupedSigmoidRouter, SoftmaxRouter

HIDDEN = 16


@st.composite
def routings(draw: st.DrawFn) -> dict[str, int | bool | float]:
    n_group = draw(st.sampled_from([1, 2, 4]))
    per_group = draw(st.integers(2, 5))
    topk_group = draw(st.integers(1, n_group))
    return {
        "num_experts": n_group * per_group,
        "n_group": n_group,
        "topk_group": topk_group,
        "num_experts_per_tok": draw(st.integers(1, topk_group * per_group)),
        "norm_topk_prob": draw(st.booleans()),
        "routed_scaling_factor": draw(st.sampled_from([1.0, 2.5])),
    }


def routers(
    fields: dict[str, int | bool | float], seed: int = 0
) -> tuple[GroupedSigmoidRouter, torch.nn.Module]:
    """Ours and theirs, with the same weights."""
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

    renamed = {name: value for name, value in fields.items() if name != "num_experts"}
    theirs = DeepseekV3TopkRouter(
        DeepseekV3Config(hidden_size=HIDDEN, n_routed_experts=fields["num_experts"], **renamed)
    )
    generator = torch.Generator().manual_seed(seed)
    state = {
        "weight": torch.randn(fields["num_experts"], HIDDEN, generator=generator),
        # As large as the scores: the choice and the weights must use different numbers.
        "e_score_correction_bias": torch.rand(fields["num_experts"], generator=generator),
    }
    ours = GroupedSigmoidRouter(hidden_size=HIDDEN, **fields)
    for router in (ours, theirs):
        router.load_state_dict(state)
    return ours, theirs


@given(routings(), st.integers(0, 2**16))
@torch.inference_mode()
def test_the_choice_is_transformers(fields: dict[str, int | bool | float], seed: int) -> None:
    ours, theirs = routers(fields, seed)
    hidden = torch.randn(9, HIDDEN, generator=torch.Generator().manual_seed(seed + 1))
    got = ours(hidden)
    _, weights, ids = theirs(hidden)
    assert got.topk_ids.dtype == torch.int64
    assert got.topk_weights.dtype == torch.float32
    order, their_order = got.topk_ids.argsort(dim=1), ids.argsort(dim=1)
    assert torch.equal(got.topk_ids.gather(1, order), ids.gather(1, their_order))
    torch.testing.assert_close(
        got.topk_weights.gather(1, order), weights.gather(1, their_order), atol=1e-6, rtol=1e-5
    )


FIELDS: dict[str, int | bool | float] = {
    "num_experts": 8,
    "n_group": 4,
    "topk_group": 2,
    "num_experts_per_tok": 3,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
}


@torch.inference_mode()
def test_only_the_best_groups_are_chosen_from() -> None:
    ours, _ = routers(FIELDS)
    chosen = ours(torch.randn(50, HIDDEN, generator=torch.Generator().manual_seed(0))).topk_ids
    groups = [{int(expert) // 2 for expert in row} for row in chosen]
    assert max(map(len, groups)) == 2
    assert len(set().union(*groups)) == 4


@torch.inference_mode()
def test_the_bias_moves_the_choice_and_not_the_weights() -> None:
    ours, _ = routers(FIELDS | {"n_group": 1, "topk_group": 1, "norm_topk_prob": False})
    hidden = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(0))
    ours.e_score_correction_bias.zero_()[6] = 10.0
    got = ours(hidden)
    assert (got.topk_ids == 6).any(dim=1).all()
    scores = torch.sigmoid(hidden @ ours.weight.T)
    torch.testing.assert_close(got.topk_weights, scores.gather(1, got.topk_ids) * 2.5)


@torch.inference_mode()
def test_normalised_weights_sum_to_the_scaling_factor() -> None:
    ours, _ = routers(FIELDS)
    hidden = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours(hidden).topk_weights.sum(dim=1), torch.full((5,), 2.5))


@torch.inference_mode()
def test_scores_are_computed_in_float32_for_a_bfloat16_model() -> None:
    ours, _ = routers(FIELDS)
    ours.weight.data = ours.weight.data.bfloat16()
    hidden = torch.randn(40, HIDDEN, generator=torch.Generator().manual_seed(0)).bfloat16()
    got = ours(hidden)
    ours.weight.data = ours.weight.data.float()
    wanted = ours(hidden.float())
    assert torch.equal(got.topk_ids, wanted.topk_ids)
    assert torch.equal(got.topk_weights, wanted.topk_weights)


@pytest.mark.parametrize("num_tokens", [0, 1])
@torch.inference_mode()
def test_no_token_and_one(num_tokens: int) -> None:
    got = routers(FIELDS)[0](torch.zeros(num_tokens, HIDDEN))
    assert got.topk_ids.shape == got.topk_weights.shape == (num_tokens, 3)


@given(
    num_experts=st.integers(1, 9),
    chosen=st.integers(1, 9),
    norm_topk_prob=st.booleans(),
    seed=st.integers(0, 2**16),
)
@torch.inference_mode()
def test_the_choice_by_softmax_is_transformers(
    num_experts: int, chosen: int, norm_topk_prob: bool, seed: int
) -> None:
    from transformers import Qwen3NextConfig
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextTopKRouter

    fields = {
        "hidden_size": HIDDEN,
        "num_experts": num_experts,
        "num_experts_per_tok": min(chosen, num_experts),
        "norm_topk_prob": norm_topk_prob,
    }
    ours, theirs = SoftmaxRouter(**fields), Qwen3NextTopKRouter(Qwen3NextConfig(**fields))
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(num_experts, HIDDEN, generator=generator)
    for router in (ours, theirs):
        router.load_state_dict({"weight": weight})
    hidden = torch.randn(9, HIDDEN, generator=generator)
    got = ours(hidden)
    _, weights, ids = theirs(hidden)
    assert torch.equal(got.topk_ids, ids)
    torch.testing.assert_close(got.topk_weights, weights, atol=1e-6, rtol=1e-5)
    assert ours(hidden[:0]).topk_ids.shape == (0, fields["num_experts_per_tok"])
