"""Log-probabilities of chosen tokens and of the most likely ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from mortise.engine.request import Request


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural log-probabilities at one place, as the model gives them, before any filter.

    Args:
        token: of the chosen token.
        top: token ids and log-probabilities of the most likely tokens, the best first.
    """

    token: float
    top: tuple[tuple[int, float], ...]


def logprobs_of(
    logits_BV: torch.Tensor, token_ids: Sequence[int], requests: Sequence[Request]
) -> list[TokenLogprobs | None]:
    """For each row what its request asked for; None where it asked for nothing."""
    result: list[TokenLogprobs | None] = [None] * len(requests)
    for row, request in enumerate(requests):
        count = request.params.logprobs
        if count is None:
            continue
        logprobs_V = logits_BV[row].log_softmax(dim=-1)
        values, indices = logprobs_V.topk(min(count, len(logprobs_V)))
        top = tuple(zip(indices.tolist(), values.tolist(), strict=True))
        result[row] = TokenLogprobs(float(logprobs_V[token_ids[row]]), top)
    return result
