"""int4 weights with rows that are not quantised, by Triton programs that widen as they load."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mortise_cuda_common.kernels.int4_grouped import int4_gate_up, int4_product
from mortise_cuda_common.products.base import Product
from mortise_cuda_common.rows import Kind, Rows

if TYPE_CHECKING:
    import torch

    from mortise_cuda_common.groups import Groups
    from mortise_cuda_common.programs.base import Programs


@dataclass(frozen=True, slots=True)
class Int4Product(Product):
    """W4A16: value times scale is rounded to bfloat16, as the reference rounds it.

    Args:
        programs: what runs the programs.
        words: int32 ``[E_l, N, K/8]``, the stored ones.
        scale: float32 ``[E_l, N, G]``.
    """

    programs: Programs
    words: torch.Tensor
    scale: torch.Tensor

    @property
    def takes(self) -> Kind:
        """Rows of bfloat16."""
        return Kind.PLAIN

    def quantise(self, plain_RK: torch.Tensor, groups: Groups) -> Rows:
        """The rows as they are."""
        return Rows(values=plain_RK, kind=Kind.PLAIN)

    def multiply(self, rows: Rows, groups: Groups, out_dtype: torch.dtype) -> torch.Tensor:
        """Sum in float32, round once."""
        return int4_product(self.programs, rows.values, self.words, self.scale, groups, out_dtype)

    def fused_gate_up(self, rows: Rows, groups: Groups, then: Product) -> Rows | None:
        """Gate in the program, for whatever quantises it then."""
        dtype = rows.values.dtype
        gated_RI = int4_gate_up(self.programs, rows.values, self.words, self.scale, groups, dtype)
        return then.quantise(gated_RI, groups)
