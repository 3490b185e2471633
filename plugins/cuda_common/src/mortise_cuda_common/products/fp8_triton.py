"""float8 weights in blocks, multiplied by Triton programs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mortise.plugin import ScaleFormat
from mortise_cuda_common.kernels.fp8_grouped import fp8_gate_up, fp8_product
from mortise_cuda_common.kernels.fp8_rows import quantise_rows
from mortise_cuda_common.products.base import Product
from mortise_cuda_common.rows import Kind, scale_format_of

if TYPE_CHECKING:
    import torch

    from mortise_cuda_common.groups import Groups
    from mortise_cuda_common.programs.base import Programs
    from mortise_cuda_common.rows import Rows


@dataclass(frozen=True, slots=True)
class Fp8TritonProduct(Product):
    """FP8_BLOCK, with scales of any value on every chip.

    Args:
        programs: what runs the programs.
        weight: e4m3 ``[E_l, N, K]``, the stored one.
        scale: float32 ``[E_l, B, ceil(K/128)]``, B blocks counted in each part for itself.
        scale_format: of the rows' scales.
        num_parts: parts of N.
    """

    programs: Programs
    weight: torch.Tensor
    scale: torch.Tensor
    scale_format: ScaleFormat
    num_parts: int

    @property
    def takes(self) -> Kind:
        """Float8 rows, whose scales are powers of two where the weight's are."""
        return Kind.FP8_UE8M0 if self.scale_format is ScaleFormat.UE8M0 else Kind.FP8

    def quantise(self, plain_RK: torch.Tensor, groups: Groups) -> Rows:
        """Quantise each 128 columns of a row."""
        return quantise_rows(self.programs, plain_RK, groups, self.scale_format)

    def multiply(self, rows: Rows, groups: Groups, out_dtype: torch.dtype) -> torch.Tensor:
        """Sum 128 columns by the tensor cores, scale them, and add them up in float32."""
        return fp8_product(
            self.programs,
            rows,
            self.weight,
            self.scale,
            groups,
            out_dtype,
            num_parts=self.num_parts,
        )

    def fused_gate_up(self, rows: Rows, groups: Groups, then: Product) -> Rows | None:
        """One program, with float32 from the sums to the rows that ``then`` takes."""
        if then.takes is Kind.NVFP4:
            return None
        return fp8_gate_up(
            self.programs, rows, self.weight, self.scale, groups, scale_format_of(then.takes)
        )
