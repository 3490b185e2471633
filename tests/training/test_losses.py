from typing import TYPE_CHECKING

import pytest
import torch
import torch.nn.functional as F
from training.attention import (
    attention_weights,
    head_mean,
    highest,
    index_loss,
    index_scores,
    later_hidden,
)
from training.balance import LoadBalancer
from training.losses import linear_cross_entropy
from training.norm import rms_norm

from mortise.layers.index_selection import RowSpan, select_keys
from mortise.layers.mla import IndexProjections
from mortise.layers.router import GroupedSigmoidRouter

if TYPE_CHECKING:
    from mortise.spec.dispatch import Routing


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def leaf(*shape: int) -> torch.Tensor:
    return torch.randn(shape, requires_grad=True)


def test_cross_entropy_and_its_gradients_over_several_blocks() -> None:
    hidden, weight = leaf(600, 16), leaf(50, 16)
    targets = torch.randint(0, 50, (600,))
    loss = linear_cross_entropy(hidden, weight, targets)
    expected = F.cross_entropy(hidden @ weight.T, targets)
    assert loss.item() == pytest.approx(expected.item(), rel=5e-3)
    found = torch.autograd.grad(2 * loss, (hidden, weight))
    wanted = torch.autograd.grad(2 * expected, (hidden, weight))
    for one, other in zip(found, wanted, strict=True):
        assert (one - other).norm() < 0.02 * other.norm()  # the products run in bfloat16


def test_rms_norm_is_torchs() -> None:
    x, weight, grad = leaf(5, 7, 16), leaf(16), torch.randn(5, 7, 16)
    one, other = rms_norm(x, weight, 1e-6), F.rms_norm(x, (16,), weight, 1e-6)
    torch.testing.assert_close(one, other)
    found = torch.autograd.grad(one, (x, weight), grad)
    torch.testing.assert_close(found, torch.autograd.grad(other, (x, weight), grad))


def test_attention_weights_are_a_masked_softmax() -> None:
    query, key, grad = leaf(2, 9, 8), leaf(2, 9, 8), torch.randn(2, 9, 9)
    hidden = torch.ones(9, 9, dtype=torch.bool).triu(1)
    one = attention_weights(query, key, later_hidden(9, torch.float32), 0.3)
    other = (query @ key.mT * 0.3).masked_fill(hidden, float("-inf")).softmax(-1)
    torch.testing.assert_close(one, other)
    found = torch.autograd.grad(one, (query, key), grad)
    torch.testing.assert_close(found, torch.autograd.grad(other, (query, key), grad))


def test_the_index_loss_is_the_divergence_over_visible_keys() -> None:
    query, key, weights = leaf(9, 3, 8), leaf(9, 8), leaf(9, 3)
    hidden = torch.ones(9, 9, dtype=torch.bool).triu(1)
    mask = later_hidden(9, torch.float32)
    attention = attention_weights(torch.randn(2, 9, 4), torch.randn(2, 9, 4), mask, 1.0)
    target = head_mean(attention)
    index = IndexProjections(query=query, key=key, weights=weights)
    scores, products = index_scores(index)
    loss = index_loss(index, scores, products, target, mask)

    naive = torch.einsum("qnd,kd->nqk", query, key).relu()
    naive = torch.einsum("nqk,qn->qk", naive, weights)
    torch.testing.assert_close(scores, naive)
    logs = naive.masked_fill(hidden, float("-inf")).log_softmax(-1)
    divergences = [
        sum(target[q, k] * (target[q, k].log() - logs[q, k]) for k in range(q + 1))
        for q in range(9)
    ]
    expected = torch.stack(divergences).mean()
    torch.testing.assert_close(loss, expected)
    found = torch.autograd.grad(3 * loss, (query, key, weights))
    torch.testing.assert_close(found, torch.autograd.grad(3 * expected, (query, key, weights)))


def test_the_bias_moves_against_the_load() -> None:
    router = GroupedSigmoidRouter(
        hidden_size=4,
        num_experts=4,
        num_experts_per_tok=1,
        n_group=1,
        topk_group=1,
        norm_topk_prob=True,
        routed_scaling_factor=1.0,
    )
    with torch.no_grad():
        router.weight.zero_()
        router.e_score_correction_bias.copy_(torch.tensor([0.3, 0.1, 0.0, 0.0]))
    balancer = LoadBalancer([router])
    routing: Routing = router(torch.randn(6, 4))
    assert routing.topk_ids.eq(0).all()
    with torch.no_grad():
        router(torch.randn(6, 4))  # measuring is not counted
    assert balancer.update(0.01) == 4.0
    expected = torch.tensor([0.29, 0.11, 0.01, 0.01])
    torch.testing.assert_close(router.e_score_correction_bias, expected)
    assert balancer.update(0.01) == 0.0


def test_the_highest_scores_are_those_that_the_engine_selects() -> None:
    scores = torch.randint(0, 6, (40, 40)).float() - 2  # many are equal
    visible = torch.arange(1, 41)
    selected = select_keys(scores, visible, 8, [RowSpan(0, 40, 40)])
    expected = torch.zeros(40, 41, dtype=torch.bool)
    expected.scatter_(1, torch.where(selected < 0, 40, selected), True)
    causal = torch.ones(40, 40, dtype=torch.bool).tril()
    found = highest(scores.masked_fill(~causal, float("-inf")), 8) & causal
    assert torch.equal(found, expected[:, :40])
