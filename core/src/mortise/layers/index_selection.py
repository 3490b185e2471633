"""The keys that the indexer's scores pick for each query."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from collections.abc import Sequence


class RowSpan(NamedTuple):
    """Rows ``start`` to ``end`` of a pass choose among ``width`` keys, seen or not."""

    start: int
    end: int
    width: int


def select_keys(
    logits_TC: torch.Tensor, visible_T: torch.Tensor, topk: int, spans: Sequence[RowSpan]
) -> torch.Tensor:
    """The ``topk`` best visible positions of each row, in no particular order.

    The scores alone do not settle it: with few index heads many keys score exactly zero, and where
    such a tie straddles the last place, somebody must choose. It is ``torch.topk`` over the row's
    own width. So the choice does not depend on what else is in the batch or on how a prompt was
    chunked, and it is the choice of Hugging Face transformers.

    Args:
        logits_TC: float32 scores, columns at or past a row's length undefined.
        visible_T: int64 ``[T]``, keys each row may see, itself included.
        topk: how many to keep.
        spans: the width of every row; a key past ``visible_T`` counts as one of minus infinity.

    Returns:
        int64 ``[T, topk]``, -1 where a row sees fewer.
    """
    columns = torch.arange(logits_TC.shape[1], device=logits_TC.device)
    unseen_TC = columns >= visible_T.unsqueeze(1)
    scores_TC = logits_TC.masked_fill(unseen_TC, float("-inf"))
    chosen_TK = visible_T.new_full((len(visible_T), topk), -1)
    for start, end, width in spans:
        rows = scores_TC[start:end, :width]
        if rows.shape[1] < width:
            rows = F.pad(rows, (0, width - rows.shape[1]), value=float("-inf"))
        count = min(topk, width)
        # The set is the same as of sorted results, for half the time.
        chosen_TK[start:end, :count] = rows.topk(count, dim=1, sorted=False).indices
    return chosen_TK.masked_fill(chosen_TK >= visible_T.unsqueeze(1), -1)
