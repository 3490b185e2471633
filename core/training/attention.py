"""Attention within the sequences at hand, for training: dense, and sparse with a learning indexer.

Each strategy is an `Attend` of `mortise.layers.mla`: it gets the projections of B equal-length
sequences laid end to end and sees no cache.

Shape suffixes: B sequences, S tokens of a sequence, T = B * S, N heads, D head size, V value size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np
import torch
from torch import Tensor

from mortise.layers.mla import IndexProjections

if TYPE_CHECKING:
    from mortise.layers.mla import MLAProjections, MLAttention

HIDDEN: Final = -1e9  # added to scores; finite, and twice it as well
SMALLEST_WEIGHT: Final = 1e-30


class TrainingAttention(Protocol):
    """An `Attend` that remembers the losses of the indexers it met."""

    index_losses: list[Tensor]

    def __call__(self, attention: MLAttention, projections: MLAProjections) -> Tensor:
        """Return the values attended to, [T, N, V]."""
        ...


class DenseAttention:
    """Causal attention over every earlier token of the sequence."""

    def __init__(self, sequences: int) -> None:
        self.sequences = sequences
        self.index_losses: list[Tensor] = []

    def __call__(self, attention: MLAttention, projections: MLAProjections) -> Tensor:
        """Return the values attended to, [T, N, V]."""
        query, key, value = per_sequence(attention, projections, self.sequences)
        mask_SS = later_hidden(query.shape[2], query.dtype)
        scale = attention.shape.softmax_scale
        # A sequence at a time, weights and all, stays in the cache and beats the fused kernel.
        attended = [
            (attention_weights(q, k, mask_SS, scale) @ v).transpose(0, 1)
            for q, k, v in zip(query, key, value, strict=True)
        ]
        return torch.cat(attended)


class RecentAttention:
    """Attention over the latest `window` tokens of one sequence: what an indexer has to beat."""

    def __init__(self, window: int) -> None:
        self.window = window
        self.index_losses: list[Tensor] = []

    def __call__(self, attention: MLAttention, projections: MLAProjections) -> Tensor:
        """Return the values attended to, [T, N, V]."""
        query, key, value = per_sequence(attention, projections, 1)
        mask_SS = later_hidden(query.shape[2], query.dtype)
        mask_SS += torch.full_like(mask_SS, HIDDEN).tril(-self.window)
        scale = attention.shape.softmax_scale
        return (attention_weights(query[0], key[0], mask_SS, scale) @ value[0]).transpose(0, 1)


class IndexedAttention:
    """Attention beside an indexer that learns to rank keys as attention weighs them.

    The indexer's loss is the Kullback-Leibler divergence from the attention weights, summed over
    heads and normalised to sum to one, to the softmax of its scores (DeepSeek-V3.2, section
    "Continued Pre-Training"). With `topk`, attention and loss see only the keys that the indexer
    ranks first; without, all of them.
    """

    def __init__(self, sequences: int, topk: int | None) -> None:
        self.sequences = sequences
        self.topk = topk
        self.index_losses: list[Tensor] = []

    def __call__(self, attention: MLAttention, projections: MLAProjections) -> Tensor:
        """Return the values attended to, [T, N, V]; adds the layer's loss to `index_losses`."""
        assert projections.index is not None
        query, key, value = per_sequence(attention, projections, self.sequences)
        attended, losses = [], []
        for row, index in enumerate(index_rows(projections.index, self.sequences)):
            scores_SS, products = index_scores(index)
            mask_SS = self._mask(scores_SS)
            scale = attention.shape.softmax_scale
            weights_NSS = attention_weights(query[row], key[row], mask_SS.to(query.dtype), scale)
            attended.append((weights_NSS @ value[row]).transpose(0, 1))
            target_SS = head_mean(weights_NSS)
            losses.append(index_loss(index, scores_SS, products, target_SS, mask_SS))
        self.index_losses.append(torch.stack(losses).mean())
        return torch.cat(attended)

    def _mask(self, scores_SS: Tensor) -> Tensor:
        """Return the mask that hides later keys, and all but the indexer's best."""
        later_SS = later_hidden(len(scores_SS), scores_SS.dtype)
        if self.topk is None or self.topk >= len(scores_SS):
            return later_SS
        unseen_SS = torch.full_like(later_SS, float("-inf")).triu_(1)
        chosen_SS = highest(scores_SS + unseen_SS, self.topk)
        return chosen_SS.to(later_SS.dtype).sub_(1).mul_(-HIDDEN).add_(later_SS)


def highest(scores_SS: Tensor, count: int) -> Tensor:
    """Return which `count` scores of each row are its highest; at least those, of minus infinity.

    The set that `torch.topk` picks, which is what the engine serves, but found several times as
    fast: only rows where equal scores compete for the last place are left to `torch.topk`.
    """
    place = scores_SS.shape[1] - count
    threshold_S1 = torch.from_numpy(np.partition(scores_SS.numpy(), place, axis=1)[:, place, None])
    chosen_SS = scores_SS >= threshold_S1
    is_crowded_S = chosen_SS.sum(dim=1) > count
    rows = (is_crowded_S & threshold_S1[:, 0].isfinite()).nonzero()[:, 0]
    if len(rows):
        best = scores_SS[rows].topk(count, dim=1).indices
        exact = torch.zeros(len(rows), scores_SS.shape[1], dtype=torch.bool).scatter_(1, best, True)
        chosen_SS[rows] = exact
    return chosen_SS


def later_hidden(length: int, dtype: torch.dtype) -> Tensor:
    """Return the mask [S, S] that is added to scores of queries against keys: causal."""
    return torch.full((length, length), HIDDEN, dtype=dtype).triu_(1)


def per_sequence(
    attention: MLAttention, projections: MLAProjections, sequences: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries and keys [B, N, S, D] and values [B, N, S, V]."""
    query_TND = torch.cat([projections.query_nope, projections.query_rope], dim=-1)
    key_NTD, value_NTV = attention.expand(projections.latent)
    query = query_TND.unflatten(0, (sequences, -1)).transpose(1, 2)
    key = key_NTD.unflatten(1, (sequences, -1)).transpose(0, 1)
    value = value_NTV.unflatten(1, (sequences, -1)).transpose(0, 1)
    return query, key, value


def index_rows(index: IndexProjections, sequences: int) -> list[IndexProjections]:
    """Return the indexer's projections of each sequence: [S, N, D], [S, D] and [S, N]."""
    parts = (
        index.query.chunk(sequences),
        index.key.chunk(sequences),
        index.weights.chunk(sequences),
    )
    return [
        IndexProjections(query=query, key=key, weights=weights)
        for query, key, weights in zip(*parts, strict=True)
    ]


@torch.no_grad()
def index_scores(index: IndexProjections) -> tuple[Tensor, list[Tensor]]:
    """Return float32 scores [S queries, S keys], not masked, and each head's relu(q . k) [S, S]."""
    scores_SS = torch.zeros(len(index.key), len(index.key))
    products = []
    for head in range(index.query.shape[1]):
        product_SS = torch.mm(index.query[:, head], index.key.T).relu_()
        scores_SS.addcmul_(product_SS.float(), index.weights[:, head, None])
        products.append(product_SS)
    return scores_SS, products


def attention_weights(query_NSD: Tensor, key_NSD: Tensor, mask_SS: Tensor, scale: float) -> Tensor:
    """Return the softmax [N, S, S], in the queries' dtype, of scaled products plus mask."""
    weights_NSS: Tensor = _AttentionWeights.apply(query_NSD, key_NSD, mask_SS, scale)  # type: ignore[no-untyped-call]
    return weights_NSS


class _AttentionWeights(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, mask_SS: Tensor, scale: float) -> Tensor:
        mask = mask_SS.expand(len(query), -1, -1)
        scores = torch.baddbmm(mask, query, key.mT, alpha=scale)
        weights = torch._softmax(scores, -1, False)
        ctx.save_for_backward(query, key, weights)
        ctx.scale = scale
        return weights

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        query, key, weights = ctx.saved_tensors
        # Hidden keys have weight zero, hence gradient zero.
        grad = torch._softmax_backward_data(grads[0], weights, -1, weights.dtype) * ctx.scale
        return torch.bmm(grad, key), torch.bmm(grad.mT, query), None, None


@torch.no_grad()
def head_mean(weights_NSS: Tensor) -> Tensor:
    """Return the float32 mean over heads; each head's rows sum to one, so the mean's do too."""
    total_SS = weights_NSS[0].float()
    for weights_SS in weights_NSS[1:]:
        total_SS = total_SS.add(weights_SS)
    return total_SS.div_(len(weights_NSS))


def index_loss(
    index: IndexProjections,
    scores_SS: Tensor,
    products: list[Tensor],
    target_SS: Tensor,
    mask_SS: Tensor,
) -> Tensor:
    """Return the mean over queries of KL(target || softmax of scores plus mask)."""
    loss: Tensor = _IndexLoss.apply(  # type: ignore[no-untyped-call]
        index.query, index.key, index.weights, scores_SS, products, target_SS, mask_SS
    )
    return loss


class _IndexLoss(torch.autograd.Function):
    """The divergence with its gradients taken on the way, a head at a time, from the products."""

    @staticmethod
    def forward(
        ctx: Any,
        query_SND: Tensor,
        key_SD: Tensor,
        weights_SN: Tensor,
        scores_SS: Tensor,
        products: list[Tensor],
        target_SS: Tensor,
        mask_SS: Tensor,
    ) -> Tensor:
        log_index_SS = (scores_SS + mask_SS).log_softmax(dim=-1)
        # Hidden keys have target zero and finite logs, so they add nothing.
        log_target_SS = target_SS.clamp(min=SMALLEST_WEIGHT).log_()
        difference = log_target_SS.sub_(log_index_SS).flatten()
        loss = torch.dot(target_SS.flatten(), difference) / len(key_SD)
        if any(ctx.needs_input_grad):
            grad_SS = log_index_SS.exp_().sub_(target_SS).div_(len(key_SD))
            ctx.save_for_backward(
                *score_gradients(query_SND, key_SD, weights_SN, products, grad_SS)
            )
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query_grad, key_grad, weights_grad = ctx.saved_tensors
        scale = grads[0]
        return query_grad * scale, key_grad * scale, weights_grad * scale, None, None, None, None


def score_gradients(
    query_SND: Tensor, key_SD: Tensor, weights_SN: Tensor, products: list[Tensor], grad_SS: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of queries, keys and weights, given that of the scores."""
    query_grad, weights_grad = torch.empty_like(query_SND), torch.empty_like(weights_SN)
    key_grad = torch.zeros_like(key_SD, dtype=torch.float32)
    for head, product_SS in enumerate(products):
        weights_grad[:, head] = torch.linalg.vecdot(grad_SS, product_SS.float())
        inner = (grad_SS * weights_SN[:, head, None]).mul_(product_SS.sign())
        inner = inner.to(query_SND.dtype)
        query_grad[:, head] = inner @ key_SD
        key_grad += inner.T @ query_SND[:, head]
    return query_grad, key_grad.to(key_SD.dtype), weights_grad
