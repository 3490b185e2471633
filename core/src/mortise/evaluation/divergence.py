"""How far one model's predictions of a window are from another's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

# Shape suffixes: T predicted tokens, R of them at once, V vocabulary.

CHUNK_ELEMENTS: Final = 2**18
"""Log-probabilities of one model held in double precision at once: 2 MiB, which stay in the
processor's caches; 16 MiB took three times as long."""


@dataclass(frozen=True, slots=True)
class Divergence:
    """Sums over the predicted tokens of one window.

    Args:
        num_tokens: how many were predicted.
        reference_nats: negative natural log-likelihood of them under the reference.
        nats: the same under the model that is compared.
        divergence_nats: Kullback-Leibler divergence of the model from the reference,
            KL(reference || model), in nats.
        num_agreeing: where the likeliest token of both is the same one.
    """

    num_tokens: int
    reference_nats: float
    nats: float
    divergence_nats: float
    num_agreeing: int


def divergence(
    reference_TV: torch.Tensor, other_TV: torch.Tensor, token_ids: Sequence[int]
) -> Divergence:
    """Compare what two models expect at the same places of the same text.

    In double precision on the processor, a few places at a time, since the difference of two models
    that nearly agree is small beside what it is the difference of. Two equal tensors diverge by
    exactly nothing.

    Args:
        reference_TV: float32 logits ``[T, V]``.
        other_TV: float32 logits ``[T, V]``.
        token_ids: the T tokens that came.
    """
    assert reference_TV.shape == other_TV.shape
    assert len(reference_TV) == len(token_ids)
    wanted_T = torch.tensor(token_ids)
    sums = torch.zeros(4, dtype=torch.float64)
    for rows in _chunks(*reference_TV.shape):
        sums += _sums(reference_TV[rows], other_TV[rows], wanted_T[rows])
    reference_nats, nats, divergence_nats, num_agreeing = sums.tolist()
    return Divergence(len(token_ids), reference_nats, nats, divergence_nats, int(num_agreeing))


def _chunks(num_rows: int, num_columns: int) -> Iterator[slice]:
    step = max(CHUNK_ELEMENTS // num_columns, 1)
    return (slice(start, start + step) for start in range(0, num_rows, step))


def _sums(
    reference_RV: torch.Tensor, other_RV: torch.Tensor, wanted_R: torch.Tensor
) -> torch.Tensor:
    """Nats of the reference and of the other, divergence, agreements; float64 ``[4]``."""
    reference_RV, other_RV = reference_RV.cpu(), other_RV.cpu()
    agreeing = (reference_RV.argmax(dim=-1) == other_RV.argmax(dim=-1)).sum()
    reference_RV = reference_RV.double().log_softmax(dim=-1)
    other_RV = other_RV.double().log_softmax(dim=-1)
    probabilities_RV = reference_RV.exp()
    # What the reference rules out adds nothing, whatever the other makes of it.
    terms_RV = probabilities_RV * (reference_RV - other_RV)
    terms_RV = terms_RV.masked_fill(probabilities_RV == 0, 0.0)
    wanted_R1 = wanted_R.unsqueeze(1)
    return torch.stack(
        [
            -reference_RV.gather(1, wanted_R1).sum(),
            -other_RV.gather(1, wanted_R1).sum(),
            terms_RV.sum(),
            agreeing.double(),
        ]
    )
