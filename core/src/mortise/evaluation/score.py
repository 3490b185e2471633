"""What the log-probabilities of a text amount to."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Score:
    """The sum over every predicted token of a text.

    Args:
        nats: negative natural log-likelihood of all of them.
        predicted_tokens: how many.
        text_bytes: UTF-8 bytes of the text behind them.
    """

    nats: float
    predicted_tokens: int
    text_bytes: int

    @property
    def nats_per_token(self) -> float:
        """Mean negative log-likelihood."""
        return self.nats / self.predicted_tokens

    @property
    def perplexity(self) -> float:
        """Per token; comparable only between models that cut text into the same tokens.

        Infinite where it exceeds every number, as of a model that broke.
        """
        try:
            return math.exp(self.nats_per_token)
        except OverflowError:
            return math.inf

    @property
    def bits_per_byte(self) -> float:
        """Comparable between all models."""
        return self.nats / math.log(2) / self.text_bytes
