"""The likelihood of texts under a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mortise.evaluation.score import Score
from mortise.evaluation.texts import total_bytes
from mortise.evaluation.windows import num_predictions, predictions

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mortise.evaluation.texts import Document

    Logits = Callable[[Sequence[int]], torch.Tensor]
    """float32 ``[T, vocab]`` of T tokens, as ``LLM.logits``."""


def score_documents(
    logits: Logits,
    documents: Sequence[Document],
    token_ids: Sequence[Sequence[int]],
    *,
    length: int,
    stride: int,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Score:
    """Predict every token of every text but the first from those before it in the same text.

    Args:
        logits: the model.
        documents: the texts.
        token_ids: the tokens of each.
        length: tokens of a window, at most the model's context.
        stride: tokens from one window to the next.
        progress: told how many tokens are predicted, and how many there are.
    """
    num_tokens = num_predictions(token_ids)
    nats, done = 0.0, 0
    for read, wanted in predictions(token_ids, length, stride):
        nats -= _log_likelihood(logits(read)[-len(wanted) :], wanted)
        done += len(wanted)
        progress(done, num_tokens)
    return Score(nats, done, total_bytes(documents))


def _log_likelihood(logits_TV: torch.Tensor, token_ids: Sequence[int]) -> float:
    """Summed in double precision, since a text has many tokens."""
    wanted_T1 = torch.tensor(token_ids, device=logits_TV.device).unsqueeze(1)
    return float(logits_TV.log_softmax(dim=-1).gather(1, wanted_T1).double().sum())
