"""What the reference multiplies rows by: a weight laid out for its scheme's arithmetic."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch


@dataclass(frozen=True, slots=True)
class QuantisedRows:
    """Rows that arrived quantised.

    Args:
        values: ``[R, K]``, or ``[R, K/2]`` where two are packed in a byte.
        scales: as their dispatch format says.
        global_scale: of NVFP4 rows; None for all others.
    """

    values: torch.Tensor
    scales: torch.Tensor
    global_scale: float | None = None


class Product(ABC):
    """One projection ``[N, K]``, ready to be multiplied by rows."""

    __slots__ = ()

    @abstractmethod
    def apply(self, rows_RK: torch.Tensor, bias_N: torch.Tensor | None = None) -> torch.Tensor:
        """Quantise rows of the compute dtype as the scheme says, multiply, add the bias.

        Returns:
            ``[R, N]`` in storage of its own: the float32 sums, not rounded yet; where the scheme
            multiplies in the rows' dtype, that.
        """

    def apply_quantised(self, rows: QuantisedRows) -> torch.Tensor:
        """Multiply rows that arrived in the format this scheme multiplies, as they are.

        Returns:
            The float32 sums ``[R, N]``.
        """
        raise AssertionError("the check of dispatched tokens lets no such rows through")


def add_bias(sums_RN: torch.Tensor, bias_N: torch.Tensor | None) -> torch.Tensor:
    """Add a bias to float32 sums before anything is rounded."""
    return sums_RN if bias_N is None else sums_RN + bias_N.float()


def add_up(summands: Iterator[torch.Tensor]) -> torch.Tensor:
    """Sum tensors of one shape in their order, into the first of them."""
    total = next(summands)
    for summand in summands:
        total += summand
    return total
