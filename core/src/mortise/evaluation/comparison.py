"""Several models compared with one, on the same windows of the same texts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mortise.evaluation.divergence import Divergence, divergence
from mortise.evaluation.estimate import Estimate
from mortise.evaluation.score import Score
from mortise.evaluation.texts import total_bytes
from mortise.evaluation.windows import num_predictions, predictions

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from mortise.evaluation.likelihood import Logits
    from mortise.evaluation.texts import Document


@dataclass(frozen=True, slots=True)
class Comparison:
    """One model beside the reference, window by window.

    Args:
        windows: at least one.
        text_bytes: UTF-8 bytes of the texts behind them.
    """

    windows: tuple[Divergence, ...]
    text_bytes: int

    @property
    def score(self) -> Score:
        """How well the model predicts the texts."""
        return self._score([window.nats for window in self.windows])

    @property
    def reference_score(self) -> Score:
        """How well the reference does."""
        return self._score([window.reference_nats for window in self.windows])

    @property
    def excess_nats(self) -> Estimate:
        """Negative log-likelihood of a token beyond the reference's; negative if it is better.

        Both predict the same tokens, so that what makes one window harder than another cancels.
        """
        return self._estimate([window.nats - window.reference_nats for window in self.windows])

    @property
    def divergence_nats(self) -> Estimate:
        """KL(reference || model), of a token."""
        return self._estimate([window.divergence_nats for window in self.windows])

    @property
    def agreement(self) -> Estimate:
        """Share of places where both have the same likeliest token."""
        return self._estimate([float(window.num_agreeing) for window in self.windows])

    def _score(self, nats: Sequence[float]) -> Score:
        return Score(sum(nats), sum(self._num_tokens()), self.text_bytes)

    def _estimate(self, sums: Sequence[float]) -> Estimate:
        return Estimate.per_token(sums, self._num_tokens())

    def _num_tokens(self) -> list[int]:
        return [window.num_tokens for window in self.windows]


def compare_documents(
    reference: Logits,
    others: Mapping[str, Logits],
    documents: Sequence[Document],
    token_ids: Sequence[Sequence[int]],
    *,
    length: int,
    stride: int,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> dict[str, Comparison]:
    """Let the reference and every other model predict each window before the next one is read.

    So that the logits of one window and two models are all that is ever kept.

    Args:
        reference: what the others are compared with.
        others: by name.
        documents: the texts.
        token_ids: the tokens of each; at least one text has two.
        length: tokens of a window, at most the models' context.
        stride: tokens from one window to the next.
        progress: told how many predictions are made, of all models, and how many there are.
    """
    total = num_predictions(token_ids) * (len(others) + 1)
    found: dict[str, list[Divergence]] = {name: [] for name in others}
    done = 0
    for read, wanted in predictions(token_ids, length, stride):
        expected_TV = reference(read)[-len(wanted) :]
        progress(done := done + len(wanted), total)
        for name, logits in others.items():
            found[name].append(divergence(expected_TV, logits(read)[-len(wanted) :], wanted))
            progress(done := done + len(wanted), total)
    text_bytes = total_bytes(documents)
    return {name: Comparison(tuple(ones), text_bytes) for name, ones in found.items()}
