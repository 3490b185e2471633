"""The keys that the indexer's scores pick for each query."""

from __future__ import annotations

import torch


def select_keys(logits_TC: torch.Tensor, visible_T: torch.Tensor, topk: int) -> torch.Tensor:
    """The ``topk`` best visible positions of each row, best first.

    Equal scores go to the lower position: the choice is a function of the scores alone, so every
    rank and every implementation makes the same one.

    Args:
        logits_TC: float32 scores, columns at or past a row's length undefined.
        visible_T: int64 ``[T]``, keys each row may see, itself included.
        topk: how many to keep.

    Returns:
        int64 ``[T, min(topk, C)]``, -1 where a row sees fewer.
    """
    columns = torch.arange(logits_TC.shape[1], device=logits_TC.device)
    hidden_TC = columns >= visible_T.unsqueeze(1)
    scores_TC = logits_TC.masked_fill(hidden_TC, float("-inf"))
    order_TC = scores_TC.argsort(dim=1, descending=True, stable=True)[:, :topk]
    padding = columns[: order_TC.shape[1]] >= visible_T.unsqueeze(1)
    return order_TC.masked_fill(padding, -1)
