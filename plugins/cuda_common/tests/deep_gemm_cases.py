"""Operands for DeepGEMM, and their products by torch, for every test of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from mortise.formats import fp8
from mortise.plugin import ScaleFormat
from mortise_cuda_common.chip import EMULATED, Architecture
from mortise_cuda_common.emulator.deep_gemm.fork import ForkDeepGEMM
from mortise_cuda_common.emulator.deep_gemm.upstream import UpstreamDeepGEMM
from mortise_cuda_common.libraries.deep_gemm_scales import dense_strides

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mortise_cuda_common.emulator.deep_gemm.library import EmulatedDeepGEMM

HOPPER, BLACKWELL = EMULATED[Architecture.SM90], EMULATED[Architecture.SM100]
CHIPS = (HOPPER, BLACKWELL)
LIBRARIES = (ForkDeepGEMM, UpstreamDeepGEMM)

MOST_DIFFERENCE = 1e-5
"""Of bfloat16 results from a float64 product of the same operands, as calc_diff has it."""


@dataclass(frozen=True)
class Quantised:
    """An operand: e4m3 values, float32 scales, and what the two stand for in float64."""

    values: torch.Tensor
    scale: torch.Tensor
    exact: torch.Tensor

    @property
    def pair(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.values, self.scale


def scale_format(library: EmulatedDeepGEMM) -> ScaleFormat:
    is_hopper = library._state.is_sm90
    return ScaleFormat.FLOAT32 if is_hopper else ScaleFormat.UE8M0


def plain(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rows(library: EmulatedDeepGEMM, *shape: int, seed: int = 0) -> Quantised:
    values, scale = fp8.quantise_fp8_rows(plain(*shape, seed=seed), scale_format(library))
    exact = fp8.dequantise_fp8_rows(values, scale).double()
    return Quantised(dense_strides(values), scale, exact)


def weight(library: EmulatedDeepGEMM, *shape: int, seed: int = 1) -> Quantised:
    values, scale = fp8.quantise_fp8_block(plain(*shape, seed=seed), scale_format(library))
    exact = fp8.dequantise_fp8_block(values, scale).double()
    return Quantised(dense_strides(values), scale, exact)


def row_groups(counts: Sequence[int], alignment: int) -> torch.Tensor:
    """Int32 ``[R]``: each group padded to a multiple, -1 in the padding."""
    numbers: list[int] = []
    for group, count in enumerate(counts):
        padded = -(-count // alignment) * alignment
        numbers += [group] * count + [-1] * (padded - count)
    return torch.tensor(numbers, dtype=torch.int32)


def by_own_group(a: torch.Tensor, b: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """Rows times the weight of their group; rows of none are zeros."""
    own = torch.einsum("rk,rnk->rn", a, b[groups.clamp(min=0).long()])
    return own * (groups >= 0).unsqueeze(1)


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.zeros(*shape, dtype=dtype)
