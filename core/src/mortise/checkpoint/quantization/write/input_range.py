"""What values the input of a projection takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True, slots=True)
class InputRange:
    """The smallest and the largest element that was seen."""

    low: float
    high: float

    @property
    def amax(self) -> float:
        """The largest magnitude."""
        return max(abs(self.low), abs(self.high))

    def union(self, other: Self) -> InputRange:
        """The range that holds both."""
        return InputRange(min(self.low, other.low), max(self.high, other.high))
