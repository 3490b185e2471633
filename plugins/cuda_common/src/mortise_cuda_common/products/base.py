"""What one projection of all local experts is given and gives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from mortise_cuda_common.groups import Groups
    from mortise_cuda_common.rows import Kind, Rows


class Product(ABC):
    """One projection ``[E_l, N, K]`` of all local experts, laid out for the chip."""

    __slots__ = ()

    @property
    @abstractmethod
    def takes(self) -> Kind:
        """The rows that it multiplies."""

    @abstractmethod
    def quantise(self, plain_RK: torch.Tensor, groups: Groups) -> Rows:
        """Rows of the kind that it takes, of plain ones; those that are plain to it unchanged."""

    @abstractmethod
    def multiply(self, rows: Rows, groups: Groups, out_dtype: torch.dtype) -> torch.Tensor:
        """Multiply each group by the weight of its expert.

        Returns:
            ``[R, N]`` of dtype ``out_dtype``; rows of no group are undefined.
        """

    def fused_gate_up(self, rows: Rows, groups: Groups, then: Product) -> Rows | None:
        """Of gate over up: multiply, SwiGLU (gate first), and the rows that ``then`` takes.

        Returns:
            The rows, or None where no program does all of it for ``then``.
        """
        return None

    def for_rows(self, groups: Groups) -> Product:
        """The product itself, or the one of its ways to multiply that suits so many rows."""
        return self

    def row_multiple(self, groups: Groups) -> int:
        """Every group must begin, and every slot of masked rows end, at a multiple of it."""
        return 1
