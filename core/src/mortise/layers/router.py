"""Grouped sigmoid routing with a bias that corrects the choice but not the weight."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from mortise.spec.dispatch import Routing


class GroupedSigmoidRouter(nn.Module):
    """DeepSeek-V3's router (``noaux_tc``; arXiv 2412.19437 section 2.1.2).

    Scores are sigmoids in float32. The choice adds ``e_score_correction_bias``; a group's score is
    the sum of its two best; only experts of the ``topk_group`` best groups can be chosen. The
    weights are the unbiased scores, normalised to sum to one if ``norm_topk_prob``, then scaled.

    T tokens, E experts, G groups, K chosen.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        num_experts: int,
        num_experts_per_tok: int,
        n_group: int,
        topk_group: int,
        norm_topk_prob: bool,
        routed_scaling_factor: float,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.register_buffer(
            "e_score_correction_bias", torch.zeros(num_experts, dtype=torch.float32)
        )
        self.num_experts_per_tok = num_experts_per_tok
        self.n_group = n_group
        self.topk_group = topk_group
        self.norm_topk_prob = norm_topk_prob
        self.routed_scaling_factor = routed_scaling_factor

    e_score_correction_bias: torch.Tensor

    def forward(self, hidden_TH: torch.Tensor) -> Routing:
        """Choose experts for ``[T, H]``."""
        scores_TE = F.linear(hidden_TH.float(), self.weight.float()).float().sigmoid()
        choice_TE = scores_TE + self.e_score_correction_bias
        if self.n_group > 1:
            choice_TE = self._keep_best_groups(choice_TE)
        topk_ids = choice_TE.topk(self.num_experts_per_tok, dim=-1).indices
        weights_TK = scores_TE.gather(1, topk_ids)
        if self.norm_topk_prob:
            weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + 1e-20)
        return Routing(topk_ids=topk_ids, topk_weights=weights_TK * self.routed_scaling_factor)

    def _keep_best_groups(self, choice_TE: torch.Tensor) -> torch.Tensor:
        choice_TGE = choice_TE.unflatten(1, (self.n_group, -1))
        group_scores_TG = choice_TGE.topk(2, dim=-1).values.sum(dim=-1)
        best = group_scores_TG.topk(self.topk_group, dim=-1).indices
        dropped_TG = torch.ones_like(group_scores_TG, dtype=torch.bool).scatter_(1, best, False)
        kept: torch.Tensor = choice_TGE.masked_fill(dropped_TG.unsqueeze(-1), float("-inf"))
        return kept.flatten(1)


class SoftmaxRouter(nn.Module):
    """The most probable experts (Qwen3-MoE; arXiv 2505.09388).

    Probabilities are a softmax over all experts in float32; those of the chosen ones are the
    weights, normalised to sum to one if ``norm_topk_prob``.

    T tokens, E experts, K chosen.
    """

    def __init__(
        self, *, hidden_size: int, num_experts: int, num_experts_per_tok: int, norm_topk_prob: bool
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.num_experts_per_tok = num_experts_per_tok
        self.norm_topk_prob = norm_topk_prob

    def forward(self, hidden_TH: torch.Tensor) -> Routing:
        """Choose experts for ``[T, H]``."""
        scores_TE = F.linear(hidden_TH.float(), self.weight.float()).softmax(dim=-1)
        weights_TK, topk_ids = scores_TE.topk(self.num_experts_per_tok, dim=-1)
        if self.norm_topk_prob:
            weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
        return Routing(topk_ids=topk_ids, topk_weights=weights_TK)
