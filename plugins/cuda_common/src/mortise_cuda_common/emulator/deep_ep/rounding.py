"""Rows rounded to e4m3 as the vendor's low-latency kernel does it."""

# csrc/kernels/legacy/internode_ll.cu and utils.cuh: calculate_fp8_scales.

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from mortise.formats.fp8 import E4M3_MAX, GROUP, ceil_to_ue8m0, to_e4m3

if TYPE_CHECKING:
    import torch

SMALLEST_AMAX: Final = 1e-4


def rounded(rows_TH: torch.Tensor, *, round_scale: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 ``[T, H]`` and float32 scales ``[T, H/128]``, powers of two where they are rounded.

    Unlike the rule of ``mortise.formats.fp8`` the largest magnitude is at least 1e-4, the scale is
    amax times the rounded 1/448, and values are multiplied by 448/amax.
    """
    groups = rows_TH.float().unflatten(1, (rows_TH.shape[1] // GROUP, GROUP))
    amax = groups.abs().amax(dim=-1).clamp(min=SMALLEST_AMAX)
    scales = amax * amax.new_full((), 1.0 / E4M3_MAX)
    if round_scale:
        scales = ceil_to_ue8m0(scales)
        factors = scales.reciprocal()
    else:
        factors = amax.new_full((), E4M3_MAX) / amax
    return to_e4m3(groups * factors.unsqueeze(-1)).flatten(1), scales
