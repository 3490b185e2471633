"""NVFP4 weights, multiplied by FlashInfer where rows come in slots, else by Triton programs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from mortise_cuda_blackwell.products.nvfp4 import Nvfp4Product
from mortise_cuda_blackwell.scales import tiles_of, to_tiles
from mortise_cuda_common.rows import Kind, Rows

if TYPE_CHECKING:
    from mortise_cuda_blackwell.libraries.flashinfer import FlashInfer
    from mortise_cuda_common.groups import Groups
    from mortise_cuda_common.products.base import Product

TILES = 6
"""Dimensions of scales in tiles; scales row by row have two."""


@dataclass(frozen=True, slots=True)
class Nvfp4FlashInferProduct(Nvfp4Product):
    """Float4 rows by float4 weights.

    Rows that it quantised itself have their scales in tiles, for the product that follows; those
    that arrived get theirs arranged.

    Args:
        library: FlashInfer, which takes this weight.
    """

    library: FlashInfer

    def quantise(self, plain_RK: torch.Tensor, groups: Groups) -> Rows:
        """Quantise each 16 columns of a row under the global scale of its expert's input."""
        if not _takes(plain_RK, groups):
            # By name: a dataclass with slots is another class than the one that super() looks for.
            return Nvfp4Product.quantise(self, plain_RK, groups)
        divisors = self.input_scales.reciprocal()
        return _flat(self.library.quantise(_slots(plain_RK, groups), divisors, groups.counts))

    def multiply(self, rows: Rows, groups: Groups, out_dtype: torch.dtype) -> torch.Tensor:
        """Sum values times block scales in float32, multiply by the global scales, round once."""
        if groups.capacity is None:
            return Nvfp4Product.multiply(self, rows, groups, out_dtype)
        assert rows.scales is not None
        is_arranged = rows.scales.dim() == TILES
        tiles = rows.scales if is_arranged else to_tiles(_slots(rows.scales, groups))
        alphas = self.alphas_of(rows)[:, 0]
        if rows.global_scale is not None:
            alphas = alphas * rows.global_scale
        weight = self.weight
        weight_tiles = tiles_of(weight.scales, groups.num_groups, weight.rows, weight.columns // 16)
        return self.library.multiply(
            (_slots(rows.values, groups), tiles),
            (weight.values, weight_tiles),
            alphas.contiguous(),
            groups.counts,
            out_dtype,
        ).flatten(0, 1)

    def fused_gate_up(self, rows: Rows, groups: Groups, then: Product) -> Rows | None:
        """The product, and SwiGLU with the quantisation in one kernel of the library."""
        if groups.capacity is None:
            return Nvfp4Product.fused_gate_up(self, rows, groups, then)
        if not isinstance(then, Nvfp4FlashInferProduct):
            return None
        gate_up_R2I = self.multiply(rows, groups, torch.bfloat16)
        divisors = then.input_scales.reciprocal()
        return _flat(
            self.library.swiglu_quantise(_slots(gate_up_R2I, groups), divisors, groups.counts)
        )


def _takes(plain_RK: torch.Tensor, groups: Groups) -> bool:
    return groups.capacity is not None and plain_RK.dtype is torch.bfloat16


def _slots(flat: torch.Tensor, groups: Groups) -> torch.Tensor:
    """``[E * C, ...]`` as ``[E, C, ...]``, one after the other in memory."""
    slots: torch.Tensor = flat.unflatten(0, (groups.num_groups, -1))
    return slots.contiguous()


def _flat(quantised: tuple[torch.Tensor, torch.Tensor]) -> Rows:
    values_ECK, tiles = quantised
    return Rows(values=values_ECK.flatten(0, 1), kind=Kind.NVFP4, scales=tiles)
