"""A product that is multiplied by DeepGEMM or by Triton, as the number of rows wants it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mortise_cuda_common.choice import Choice, Runner, rows_per_expert
from mortise_cuda_common.products.base import Product

if TYPE_CHECKING:
    import torch

    from mortise_cuda_common.groups import Groups
    from mortise_cuda_common.rows import Kind, Rows


@dataclass(frozen=True, slots=True)
class ChosenProduct(Product):
    """Two ways that take rows of one kind and share the stored weight.

    Args:
        deep_gemm, triton: the ways.
        choice: the figures that decide.
    """

    deep_gemm: Product
    triton: Product
    choice: Choice

    @property
    def takes(self) -> Kind:
        """What both take."""
        return self.triton.takes

    def for_rows(self, groups: Groups) -> Product:
        """The faster one for so many rows."""
        runner = self.choice.runner(rows_per_expert(groups))
        return self.deep_gemm if runner is Runner.DEEP_GEMM else self.triton

    def quantise(self, plain_RK: torch.Tensor, groups: Groups) -> Rows:
        """As both do."""
        return self.triton.quantise(plain_RK, groups)

    def multiply(self, rows: Rows, groups: Groups, out_dtype: torch.dtype) -> torch.Tensor:
        """By the way that takes rows wherever they are."""
        return self.triton.multiply(rows, groups, out_dtype)

    def fused_gate_up(self, rows: Rows, groups: Groups, then: Product) -> Rows | None:
        """By the way that takes rows wherever they are."""
        return self.triton.fused_gate_up(rows, groups, then)
