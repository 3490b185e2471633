"""What a projection outside the experts is to its product."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class LinearProduct(ABC):
    """One projection, or a piece of its rows, laid out for the device."""

    __slots__ = ()

    @abstractmethod
    def multiply(self, rows_TK: torch.Tensor) -> torch.Tensor:
        """Quantise as the scheme says, multiply, add the bias.

        Args:
            rows_TK: bfloat16, contiguous, at least one row.

        Returns:
            ``[T, N]``, bfloat16, or float32 where a bias was added afterwards.
        """
