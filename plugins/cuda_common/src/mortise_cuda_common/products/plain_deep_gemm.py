"""bfloat16 weights, multiplied by DeepGEMM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from mortise_cuda_common.kernels.row_experts import row_experts
from mortise_cuda_common.kernels.swiglu import swiglu
from mortise_cuda_common.products.base import Product
from mortise_cuda_common.products.deep_gemm import expected_rows, is_dense, row_multiple
from mortise_cuda_common.rows import Kind, Rows

if TYPE_CHECKING:
    from mortise_cuda_common.groups import Groups
    from mortise_cuda_common.libraries.deep_gemm import DeepGEMM
    from mortise_cuda_common.programs.base import Programs


@dataclass(frozen=True, slots=True)
class PlainDeepGemmProduct(Product):
    """FLOAT of bfloat16.

    Args:
        programs: what gates between the products.
        deep_gemm: the library.
        weight: ``[E_l, N, K]``, the stored one.
    """

    programs: Programs
    deep_gemm: DeepGEMM
    weight: torch.Tensor

    @property
    def takes(self) -> Kind:
        """Rows of bfloat16."""
        return Kind.PLAIN

    def quantise(self, plain_RK: torch.Tensor, groups: Groups) -> Rows:
        """The rows as they are."""
        return Rows(values=plain_RK, kind=Kind.PLAIN)

    def multiply(self, rows: Rows, groups: Groups, out_dtype: torch.dtype) -> torch.Tensor:
        """Multiply to bfloat16; a wider result is widened from it."""
        if is_dense(groups):
            return F.linear(rows.values, self.weight.squeeze(0)).to(out_dtype)
        shape = (groups.num_rows, self.weight.shape[1])
        out_RN = torch.empty(shape, dtype=torch.bfloat16, device=rows.values.device)
        if groups.capacity is None:
            experts_R = row_experts(self.programs, groups)
            self.deep_gemm.bf16_contiguous(rows.values, self.weight, experts_R, out_RN)
        else:
            slots = (groups.num_groups, groups.capacity)
            self.deep_gemm.bf16_masked(
                rows.values.unflatten(0, slots),
                self.weight,
                groups.counts,
                expected_rows(groups),
                out_RN.unflatten(0, slots),
            )
        return out_RN.to(out_dtype)

    def fused_gate_up(self, rows: Rows, groups: Groups, then: Product) -> Rows | None:
        """The product, one program behind it, and what quantises then."""
        gate_up_R2I = self.multiply(rows, groups, torch.bfloat16)
        return then.quantise(swiglu(self.programs, gate_up_R2I, groups), groups)

    def row_multiple(self, groups: Groups) -> int:
        """The alignment that the library names, or the rows of a slot that it multiplies right."""
        return row_multiple(self.deep_gemm, groups)
