"""A mean over tokens, and how far another text of the same kind would move it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean and its standard error; None where there is but one window to tell it from."""

    mean: float
    standard_error: float | None

    @classmethod
    def per_token(cls, sums: Sequence[float], num_tokens: Sequence[int]) -> Self:
        """The mean over all tokens, from the sums over the tokens of each window.

        Tokens of one window resemble each other, windows hardly do: the window is the unit that is
        drawn. The mean is then a ratio of two sums over windows, of which this is the linearised
        variance (Cochran 1977, Sampling Techniques, chapter 6).

        Args:
            sums: of W windows, at least one.
            num_tokens: of each.
        """
        assert len(sums) == len(num_tokens) >= 1
        count, total = len(sums), sum(num_tokens)
        mean = math.fsum(sums) / total
        if count == 1:
            return cls(mean, None)
        squares = math.fsum(
            (found - mean * tokens) ** 2 for found, tokens in zip(sums, num_tokens, strict=True)
        )
        return cls(mean, math.sqrt(squares * count / (count - 1)) / total)
