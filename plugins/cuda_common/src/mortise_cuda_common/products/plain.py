"""bfloat16 weights, multiplied by Triton programs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mortise_cuda_common.kernels.plain_grouped import plain_gate_up, plain_product
from mortise_cuda_common.products.base import Product
from mortise_cuda_common.rows import Kind, Rows

if TYPE_CHECKING:
    import torch

    from mortise_cuda_common.groups import Groups
    from mortise_cuda_common.programs.base import Programs


@dataclass(frozen=True, slots=True)
class PlainProduct(Product):
    """FLOAT of bfloat16.

    Args:
        programs: what runs the programs.
        weight: ``[E_l, N, K]``, the stored one.
    """

    programs: Programs
    weight: torch.Tensor

    @property
    def takes(self) -> Kind:
        """Rows of bfloat16."""
        return Kind.PLAIN

    def quantise(self, plain_RK: torch.Tensor, groups: Groups) -> Rows:
        """The rows as they are."""
        return Rows(values=plain_RK, kind=Kind.PLAIN)

    def multiply(self, rows: Rows, groups: Groups, out_dtype: torch.dtype) -> torch.Tensor:
        """Sum in float32, round once."""
        return plain_product(self.programs, rows.values, self.weight, groups, out_dtype)

    def fused_gate_up(self, rows: Rows, groups: Groups, then: Product) -> Rows | None:
        """Gate in the program, for whatever quantises it then."""
        gated_RI = plain_gate_up(self.programs, rows.values, self.weight, groups, rows.values.dtype)
        return then.quantise(gated_RI, groups)
