"""Attention within the sequences at hand, for training: dense, and sparse with a learning indexer.

Each strategy is an `Attend` of `mortise.layers.mla`: it gets the projections of B equal-length
sequences laid end to end and sees no cache.

Shape suffixes: B sequences, S tokens of a sequence, T = B * S, N heads, D head size, V value size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from mortise.layers.mla import IndexProjections, MLAProjections, MLAttention

HIDDEN_SCORE = -1e9  # finite: rows of hidden scores alone must not become NaN


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
        hidden_SS = torch.ones(query.shape[2], query.shape[2], dtype=torch.bool).triu(1)
        scale = attention.shape.softmax_scale
        # A sequence at a time, weights and all, stays in the cache and beats the fused kernel.
        attended = [
            (attention_weights(q, k, hidden_SS, scale) @ v).transpose(0, 1)
            for q, k, v in zip(query, key, value, strict=True)
        ]
        return torch.cat(attended)


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
        for row, scores_SS in enumerate(index_scores(projections.index, self.sequences)):
            hidden_SS = self._hidden(scores_SS.detach())
            weights_NSS = attention_weights(
                query[row], key[row], hidden_SS, attention.shape.softmax_scale
            )
            attended.append((weights_NSS @ value[row]).transpose(0, 1))
            losses.append(index_loss(weights_NSS.detach(), scores_SS, hidden_SS))
        self.index_losses.append(torch.stack(losses).mean())
        return torch.cat(attended)

    def _hidden(self, scores_SS: Tensor) -> Tensor:
        """Return which keys each query may not see: later ones, and all but the indexer's best."""
        later = torch.ones_like(scores_SS, dtype=torch.bool).triu(1)
        if self.topk is None or self.topk >= len(scores_SS):
            return later
        ranked = scores_SS.masked_fill(later, float("-inf"))
        best = ranked.topk(self.topk, dim=-1, sorted=False).indices
        return torch.ones_like(later).scatter_(1, best, False) | later


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


def index_scores(index: IndexProjections, sequences: int) -> list[Tensor]:
    """Return, for each sequence, the indexer's float32 scores [S queries, S keys], not masked."""
    query_BSND = index.query.unflatten(0, (sequences, -1))
    key_BSD = index.key.unflatten(0, (sequences, -1))
    weights_BSN = index.weights.unflatten(0, (sequences, -1))
    scores = []
    for query, key, weights in zip(query_BSND, key_BSD, weights_BSN, strict=True):
        products_NSS = (query.transpose(0, 1) @ key.T).relu()
        scores.append(
            torch.einsum("nqk,qn->qk", products_NSS, weights.to(products_NSS.dtype)).float()
        )
    return scores


def attention_weights(
    query_NSD: Tensor, key_NSD: Tensor, hidden_SS: Tensor, scale: float
) -> Tensor:
    """Return the softmax [N, S, S], in the queries' dtype, over the keys that are not hidden."""
    weights_NSS: Tensor = _AttentionWeights.apply(query_NSD, key_NSD, hidden_SS, scale)  # type: ignore[no-untyped-call]
    return weights_NSS


class _AttentionWeights(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, hidden_SS: Tensor, scale: float) -> Tensor:
        scores = torch.bmm(query * scale, key.mT).masked_fill_(hidden_SS, HIDDEN_SCORE)
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


def index_loss(weights_NSS: Tensor, scores_SS: Tensor, hidden_SS: Tensor) -> Tensor:
    """Return the mean over queries of KL(attention || softmax of the indexer's scores)."""
    target_SS = weights_NSS.float().mean(dim=0)  # each head sums to one, so the mean does too
    log_index_SS = scores_SS.masked_fill(hidden_SS, HIDDEN_SCORE).log_softmax(dim=-1)
    entropy = torch.xlogy(target_SS, target_SS).sum()
    # Hidden keys have target zero and a finite log, so they add nothing.
    return (entropy - (target_SS * log_index_SS).sum()) / len(target_SS)
