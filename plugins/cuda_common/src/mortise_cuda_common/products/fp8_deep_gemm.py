"""float8 weights in blocks, multiplied by DeepGEMM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from mortise.formats.fp8 import dequantise_fp8_rows
from mortise.plugin import ScaleFormat
from mortise_cuda_common.kernels.fp8_rows import quantise_rows
from mortise_cuda_common.kernels.row_experts import row_experts
from mortise_cuda_common.kernels.swiglu import swiglu, swiglu_quantise
from mortise_cuda_common.products.base import Product
from mortise_cuda_common.products.deep_gemm import (
    expected_rows,
    is_dense,
    row_multiple,
)
from mortise_cuda_common.rows import Kind, Rows, scale_format_of

if TYPE_CHECKING:
    from mortise_cuda_common.groups import Groups
    from mortise_cuda_common.libraries.deep_gemm import DeepGEMM
    from mortise_cuda_common.programs.base import Programs


@dataclass(frozen=True, slots=True)
class Fp8DeepGemmProduct(Product):
    """FP8_BLOCK.

    Args:
        programs: what quantises and gates between the products.
        deep_gemm: the library.
        weight: e4m3 ``[E_l, N, K]``.
        scale: as DeepGEMM wants the scales of this weight on this chip.
        scale_format: of the rows' scales: powers of two wherever those of the weight are.
        only_powers_of_two: whether the chip multiplies no other scales.
    """

    programs: Programs
    deep_gemm: DeepGEMM
    weight: torch.Tensor
    scale: torch.Tensor
    scale_format: ScaleFormat
    only_powers_of_two: bool

    @property
    def takes(self) -> Kind:
        """Float8 rows, whose scales are powers of two where the weight's are."""
        return Kind.FP8_UE8M0 if self.scale_format is ScaleFormat.UE8M0 else Kind.FP8

    def quantise(self, plain_RK: torch.Tensor, groups: Groups) -> Rows:
        """Quantise each 128 columns of a row."""
        return quantise_rows(self.programs, plain_RK, groups, self.scale_format)

    def multiply(self, rows: Rows, groups: Groups, out_dtype: torch.dtype) -> torch.Tensor:
        """Multiply to bfloat16; a wider result is widened from it.

        Rows that arrived with scales which the chip does not multiply are quantised once more.
        """
        assert rows.scales is not None
        if self.only_powers_of_two and rows.kind is Kind.FP8:
            plain_RK = dequantise_fp8_rows(rows.values, rows.scales, torch.bfloat16)
            rows = self.quantise(plain_RK, groups)
        if is_dense(groups):
            weight, scale = self.weight.squeeze(0), self.scale.squeeze(0)
            return self.deep_gemm.fp8_linear(rows, weight, scale, torch.bfloat16).to(out_dtype)
        multiply = self._contiguous if groups.capacity is None else self._masked
        return multiply(rows, groups).to(out_dtype)

    def fused_gate_up(self, rows: Rows, groups: Groups, then: Product) -> Rows | None:
        """The product, and one program for all behind it."""
        if then.takes is Kind.NVFP4:
            return None
        gate_up_R2I = self.multiply(rows, groups, torch.bfloat16)
        scale_format = scale_format_of(then.takes)
        if scale_format is None:
            return Rows(values=swiglu(self.programs, gate_up_R2I, groups), kind=Kind.PLAIN)
        return swiglu_quantise(self.programs, gate_up_R2I, groups, scale_format)

    def row_multiple(self, groups: Groups) -> int:
        """The alignment that the library names, or the rows of a slot that it multiplies right."""
        return row_multiple(self.deep_gemm, groups)

    def _contiguous(self, rows: Rows, groups: Groups) -> torch.Tensor:
        out_RN = self._empty(groups.num_rows, rows)
        experts_R = row_experts(self.programs, groups)
        self.deep_gemm.fp8_contiguous(rows, self.weight, self.scale, experts_R, out_RN)
        return out_RN

    def _masked(self, rows: Rows, groups: Groups) -> torch.Tensor:
        assert groups.capacity is not None
        assert rows.scales is not None
        slots = (groups.num_groups, groups.capacity)
        out_ECN: torch.Tensor = self._empty(groups.num_rows, rows).unflatten(0, slots)
        self.deep_gemm.fp8_masked(
            rows.values.unflatten(0, slots),
            rows.scales.unflatten(0, slots),
            self.weight,
            self.scale,
            groups.counts,
            expected_rows(groups),
            out_ECN,
        )
        return out_ECN.flatten(0, 1)

    def _empty(self, num_rows: int, rows: Rows) -> torch.Tensor:
        shape = (num_rows, self.weight.shape[1])
        return torch.empty(shape, dtype=torch.bfloat16, device=rows.values.device)
