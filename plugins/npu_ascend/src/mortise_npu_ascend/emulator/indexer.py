"""The keys that a sparse attention looks at: the best scores of a lightweight attention."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from mortise_npu_ascend.emulator.indexer_call import (
    EVERY_TOKEN,
    OPERATOR,
    IndexerCall,
    OneSequence,
)
from mortise_npu_ascend.emulator.poison import unwritten

if TYPE_CHECKING:
    from collections.abc import Callable


def npu_lightning_indexer(
    query: torch.Tensor,
    key: torch.Tensor,
    weights: torch.Tensor,
    *,
    actual_seq_lengths_query: torch.Tensor | None = None,
    actual_seq_lengths_key: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    layout_query: str = "BSND",
    layout_key: str = "BSND",
    sparse_count: int = 2048,
    sparse_mode: int = 3,
    pre_tokens: int = EVERY_TOKEN,
    next_tokens: int = EVERY_TOKEN,
    return_value: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """For each query the keys of highest ``sum_n weights[n] * relu(query[n] . key)``.

    There is no division by the square root of the head's size. Scores are summed in float32,
    rounded to bfloat16 and sorted, of equal ones the earlier key first, which is how the vendor's
    own tests judge the device; near a tie the device itself may choose another key.

    Args:
        query: float16 or bfloat16 ``[B, S, N, 128]`` or ``[T, N, 128]``, N at most 64.
        key: in the same dtype ``[B, S, 1, 128]``, ``[T, 1, 128]`` or, in blocks,
            ``[blocks, block size, 1, 128]``.
        weights: in the same dtype, or except on A5 float32: ``[B, S, N]`` or ``[T, N]``.
        actual_seq_lengths_query: int32 ``[B]``; in layout TND where the sequences end.
        actual_seq_lengths_key: int32 ``[B]``; in layout TND where the sequences end.
        block_table: int32 ``[B, blocks of a sequence]``, in layout PA_BSND.
        layout_query: BSND or TND.
        layout_key: the same, or PA_BSND.
        sparse_count: keys of a query, C.
        sparse_mode: 3, query t of L sees keys up to ``length of keys - L + t``; 0, all.
        pre_tokens: the default.
        next_tokens: the default.
        return_value: whether the scores are wanted; not in blocks.

    Returns:
        int32 ``[B, S, 1, C]`` or ``[T, 1, C]``, best first, then -1; and the rounded scores in the
        dtype of ``query``, with minus infinity for -1, or an empty tensor. Of a query that belongs
        to no sequence: -1 in layout BSND, unwritten in layout TND.

    Raises:
        RuntimeError: what the device refuses.
    """
    call = IndexerCall(
        query=query,
        key=key,
        weights=weights,
        query_lengths=actual_seq_lengths_query,
        key_lengths=actual_seq_lengths_key,
        block_table=block_table,
        layout_query=layout_query,
        layout_key=layout_key,
        sparse_count=sparse_count,
        sparse_mode=sparse_mode,
        pre_tokens=pre_tokens,
        next_tokens=next_tokens,
        return_value=return_value,
    )
    call.check()
    shape = (*query.shape[:-2], 1, sparse_count)
    indices, values = unwritten(shape, torch.int32), unwritten(shape, query.dtype)
    if layout_query == "BSND":
        indices.fill_(-1)
        values.fill_(float("-inf"))
    for sequence in call.sequences():
        scores_QS = _scores(sequence).masked_fill(~call.visible(sequence), float("-inf"))
        chosen_QC, best_QC = _best(scores_QS, sparse_count)
        indices[sequence.where] = chosen_QC.unsqueeze(1)
        values[sequence.where] = best_QC.to(query.dtype).unsqueeze(1)
    return indices, values if return_value else query.new_empty(0)


def _scores(sequence: OneSequence) -> torch.Tensor:
    """Rounded scores ``[Q, S]``; a head at a time, so that no more than that is in memory."""
    scores_QS = torch.zeros(sequence.query.shape[0], sequence.key.shape[0])
    key_DS = sequence.key.float().T
    for head in range(sequence.query.shape[1]):
        logits_QS = sequence.query[:, head].float() @ key_DS
        scores_QS += logits_QS.relu_() * sequence.weights[:, head].float().unsqueeze(1)
    return scores_QS.to(torch.bfloat16).float()


def _best(scores_QS: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices and scores ``[Q, count]``, best first; -1 and minus infinity where there is none."""
    found = scores_QS.sort(dim=1, descending=True, stable=True)
    taken = min(count, scores_QS.shape[1])
    indices = torch.full((scores_QS.shape[0], count), -1, dtype=torch.int32)
    values = torch.full(indices.shape, float("-inf"))
    values[:, :taken] = found.values[:, :taken]
    indices[:, :taken] = found.indices[:, :taken].to(torch.int32)
    return indices.masked_fill(values == float("-inf"), -1), values


OPERATORS: Final[tuple[tuple[str, Callable[..., object]], ...]] = (
    (OPERATOR, npu_lightning_indexer),
)
