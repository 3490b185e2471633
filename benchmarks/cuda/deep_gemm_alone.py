"""DeepGEMM's two products of experts and nothing else: what no apply on top of it can be below."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mortise.plugin import RowLayout
from mortise_cuda_common.chip import EMULATED, Architecture
from mortise_cuda_common.device import chip_of
from mortise_cuda_common.groups import Groups
from mortise_cuda_common.libraries.deep_gemm import DeepGEMM
from mortise_cuda_common.rows import Kind, Rows

if TYPE_CHECKING:
    from collections.abc import Callable

    from mortise.plugin import DispatchedTokens, ExpertWeights, StoredWeight


def library(device: torch.device) -> DeepGEMM:
    """DeepGEMM on a Hopper GPU, or emulated on anything else.

    Raises:
        MortiseError: it cannot be used.
    """
    if device.type != "cuda":
        return DeepGEMM.emulated(EMULATED[Architecture.SM90])
    return DeepGEMM.load(chip_of(device.index or 0, [Architecture.SM90]), device)


def products(
    deep_gemm: DeepGEMM, tokens: DispatchedTokens, experts: ExpertWeights
) -> Callable[[], object]:
    """Both products on rows in fp8, those between them random ones; contiguous or in slots.

    Args:
        deep_gemm: the library.
        tokens: rows that arrived in fp8.
        experts: weights with float32 scales.
    """
    groups = Groups.of(tokens)
    between = torch.randn(groups.num_rows, experts.intermediate_size, device=tokens.rows.device)
    first = _product(deep_gemm, tokens, groups, tokens.rows, tokens.scales, experts.w13)
    scales = torch.rand(groups.num_rows, -(-experts.intermediate_size // 128)).to(between) + 0.01
    values = between.clamp(-448, 448).to(torch.float8_e4m3fn)
    second = _product(deep_gemm, tokens, groups, values, scales, experts.w2)

    def call() -> None:
        first()
        second()

    return call


def _product(
    deep_gemm: DeepGEMM,
    tokens: DispatchedTokens,
    groups: Groups,
    values: torch.Tensor,
    scales: torch.Tensor | None,
    stored: StoredWeight,
) -> Callable[[], object]:
    assert scales is not None, "rows in fp8 have scales"
    assert stored.scale is not None, "weights in fp8 have scales"
    rows, columns = stored.weight.shape[-2:]
    weight_scale = deep_gemm.prepare_weight_scale(stored.scale, rows, columns)
    if tokens.format.row_layout is RowLayout.MASKED:
        slots = (groups.num_groups, groups.capacity or 0)
        values = values.reshape(*slots, columns)
        prepared = deep_gemm.prepare_row_scales(scales.reshape(*slots, -1))
        out = torch.empty(*slots, rows, dtype=torch.bfloat16, device=values.device)
        expected = max(1, -(-sum(groups.counts.tolist()) // groups.num_groups))
        return lambda: deep_gemm.fp8_masked(
            values, prepared, stored.weight, weight_scale, groups.counts, expected, out
        )
    owners = torch.full((groups.num_rows,), -1, dtype=torch.int32)
    pairs = zip(groups.first_rows.tolist(), groups.counts.tolist(), strict=True)
    for expert, (first, count) in enumerate(pairs):
        owners[first : first + count] = expert
    row_experts = owners.to(values.device)
    out = torch.empty(groups.num_rows, rows, dtype=torch.bfloat16, device=values.device)
    given = Rows(values=values, kind=Kind.FP8, scales=deep_gemm.prepare_row_scales(scales))
    return lambda: deep_gemm.fp8_contiguous(given, stored.weight, weight_scale, row_experts, out)
