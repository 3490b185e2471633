"""NVFP4 weights, multiplied by Triton programs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mortise_cuda_blackwell.kernels.nvfp4_grouped import (
    nvfp4_gate_up,
    nvfp4_product,
    weight_only_product,
)
from mortise_cuda_blackwell.kernels.nvfp4_rows import quantise_rows
from mortise_cuda_blackwell.layout import Nvfp4Weight
from mortise_cuda_common.products.base import Product
from mortise_cuda_common.rows import Kind, Rows

if TYPE_CHECKING:
    import torch

    from mortise.plugin import StoredWeight
    from mortise_cuda_common.groups import Groups
    from mortise_cuda_common.programs.base import Programs


@dataclass(frozen=True, slots=True)
class Nvfp4Product(Product):
    """Float4 rows by float4 weights.

    Rows that state a global scale, as dispatched ones do, are multiplied under that; others are
    those that this product quantised itself, under the scales that the checkpoint has for them.

    Args:
        programs: what runs the programs.
        weight: the experts.
        input_scales: float32 ``[E]``, the global scale of each expert's input.
        alphas: float32 ``[E, S]``, that times the global scale of each part of the weight.
    """

    programs: Programs
    weight: Nvfp4Weight
    input_scales: torch.Tensor
    alphas: torch.Tensor

    @classmethod
    def of(cls, programs: Programs, stored: StoredWeight) -> Nvfp4Product:
        """Lay out a weight whose input has a scale."""
        assert stored.input_scale is not None
        weight = Nvfp4Weight.of(stored)
        # The parts multiply the same rows, so the widest range serves them all.
        scales = stored.input_scale.float().reshape(weight.num_experts, -1).amax(dim=1)
        return cls(programs, weight, scales, scales.unsqueeze(1) * weight.global_scale)

    @property
    def takes(self) -> Kind:
        """Float4 rows."""
        return Kind.NVFP4

    def quantise(self, plain_RK: torch.Tensor, groups: Groups) -> Rows:
        """Quantise each 16 columns of a row under the global scale of its expert's input."""
        return quantise_rows(self.programs, plain_RK, self.input_scales, groups)

    def multiply(self, rows: Rows, groups: Groups, out_dtype: torch.dtype) -> torch.Tensor:
        """Sum values times block scales in float32, multiply by the global scales, round once."""
        return nvfp4_product(
            self.programs, rows, self.weight, self.alphas_of(rows), groups, out_dtype
        )

    def fused_gate_up(self, rows: Rows, groups: Groups, then: Product) -> Rows | None:
        """One program where float4 rows are wanted, with the roundings of three."""
        if not isinstance(then, Nvfp4Product):
            return None
        return nvfp4_gate_up(
            self.programs, rows, self.weight, self.alphas_of(rows), then.input_scales, groups
        )

    def alphas_of(self, rows: Rows) -> torch.Tensor:
        """float32 ``[E, S]``, by which sums are multiplied, beside a scale that the rows state."""
        return self.alphas if rows.global_scale is None else self.weight.global_scale


@dataclass(frozen=True, slots=True)
class Nvfp4WeightOnlyProduct(Product):
    """bfloat16 rows by float4 weights, whose input the checkpoint has no scale for.

    Args:
        programs: what runs the programs.
        weight: the experts.
    """

    programs: Programs
    weight: Nvfp4Weight

    @property
    def takes(self) -> Kind:
        """Rows of bfloat16."""
        return Kind.PLAIN

    def quantise(self, plain_RK: torch.Tensor, groups: Groups) -> Rows:
        """The rows as they are."""
        return Rows(values=plain_RK, kind=Kind.PLAIN)

    def multiply(self, rows: Rows, groups: Groups, out_dtype: torch.dtype) -> torch.Tensor:
        """Sum values times block scales in float32, multiply by the global scale, round once."""
        return weight_only_product(self.programs, rows.values, self.weight, groups, out_dtype)
