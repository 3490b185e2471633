"""DeepGEMM's first products beside torch's: a library that was imported may still be wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from mortise.formats import fp8
from mortise.plugin import BackendUnusableError, ReasonCode, ScaleFormat
from mortise_cuda_common.libraries.deep_gemm_health import INSTEAD, PIP, failure_of_use
from mortise_cuda_common.rows import Kind, Rows

if TYPE_CHECKING:
    from collections.abc import Callable

    from mortise_cuda_common.libraries.deep_gemm import DeepGEMM

ROWS: Final = 128
OUTPUTS: Final = 128
COLUMNS: Final = 256
COUNTS: Final = (1, 0, 128, 70)
"""Rows of each group."""

MOST_DIFFERENCE: Final = 1e-3
"""What the library's own tests allow a product of e4m3."""


def require_right_products(library: DeepGEMM, device: torch.device) -> None:
    """Multiply once in each way that e4m3 is multiplied.

    Args:
        library: that is tried.
        device: where.

    Raises:
        BackendUnusableError: it failed, or computed something else.
    """
    for what, difference in (
        (f"{ROWS} x {OUTPUTS} x {COLUMNS}", _of_linear),
        (f"{len(COUNTS)} contiguous groups", _of_contiguous),
        (f"{len(COUNTS)} masked groups", _of_masked),
    ):
        _require_small(library, what, difference, device)


def difference_of(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """``1 - 2 sum(xy) / sum(x^2 + y^2)`` in float64, as the library's own tests compare."""
    x, y = found.double().cpu(), wanted.double().cpu()
    return float(1 - 2 * (x * y).sum() / (x.square() + y.square()).sum())


def _require_small(
    library: DeepGEMM,
    what: str,
    difference: Callable[[DeepGEMM, torch.device], float],
    device: torch.device,
) -> None:
    try:
        found = difference(library, device)
    except Exception as error:
        raise failure_of_use(error, what) from error
    if not found < MOST_DIFFERENCE:  # NaN as well
        raise BackendUnusableError(
            f"deep_gemm {library.version} multiplies {what} wrongly here: it differs by {found:.3g}"
            " from torch",
            reason=ReasonCode.CREATE_FAILED,
            expected=f"less than {MOST_DIFFERENCE}",
            remedy=f"{PIP}, {INSTEAD}",
        )


class _Operands:
    """Random operands of some groups, and their product by torch."""

    def __init__(self, library: DeepGEMM, num_rows: int, device: torch.device) -> None:
        groups, generator = len(COUNTS), torch.Generator().manual_seed(0)
        scale_format = ScaleFormat.UE8M0 if library.packs_scales else ScaleFormat.FLOAT32
        plain = torch.randn(num_rows, COLUMNS, generator=generator)
        values, scales = fp8.quantise_fp8_rows(plain, scale_format)
        plain = torch.randn(groups, OUTPUTS, COLUMNS, generator=generator)
        weight, weight_scale = fp8.quantise_fp8_block(plain, scale_format)
        self.products = (
            fp8.dequantise_fp8_rows(values, scales)
            @ fp8.dequantise_fp8_block(weight, weight_scale).mT
        )
        kind = Kind.FP8_UE8M0 if library.packs_scales else Kind.FP8
        self.rows = Rows(values=values.to(device), scales=scales.to(device), kind=kind)
        self.weight, self.weight_scale = weight.to(device), weight_scale.to(device)


def _of_linear(library: DeepGEMM, device: torch.device) -> float:
    operands = _Operands(library, ROWS, device)
    scale = library.prepare_weight_scale(operands.weight_scale[0], OUTPUTS, COLUMNS)
    found = library.fp8_linear(operands.rows, operands.weight[0], scale)
    return difference_of(found, operands.products[0])


def _of_contiguous(library: DeepGEMM, device: torch.device) -> float:
    alignment = library.alignment()
    operands = _Operands(library, len(COUNTS) * alignment, device)
    scale = library.prepare_weight_scale(operands.weight_scale, OUTPUTS, COLUMNS)
    row_experts = torch.full((len(COUNTS) * alignment,), -1, dtype=torch.int32)
    own = []
    for group, count in enumerate(COUNTS):
        own.append(slice(group * alignment, group * alignment + min(count, alignment)))
        row_experts[own[-1]] = group
    out = torch.empty(row_experts.shape[0], OUTPUTS, dtype=torch.bfloat16, device=device)
    library.fp8_contiguous(operands.rows, operands.weight, scale, row_experts.to(device), out)
    found = torch.cat([out[rows] for rows in own])
    wanted = torch.cat([operands.products[group, rows] for group, rows in enumerate(own)])
    return difference_of(found, wanted)


def _of_masked(library: DeepGEMM, device: torch.device) -> float:
    capacity = library.slot_multiple()
    operands = _Operands(library, len(COUNTS) * capacity, device)
    scale = library.prepare_weight_scale(operands.weight_scale, OUTPUTS, COLUMNS)
    counts = [min(count, capacity) for count in COUNTS]
    assert operands.rows.scales is not None
    values = operands.rows.values.unflatten(0, (len(COUNTS), capacity))
    scales = operands.rows.scales.unflatten(0, (len(COUNTS), capacity))
    out = torch.empty(len(COUNTS), capacity, OUTPUTS, dtype=torch.bfloat16, device=device)
    library.fp8_masked(
        values,
        scales,
        operands.weight,
        scale,
        torch.tensor(counts, dtype=torch.int32, device=device),
        capacity,
        out,
    )
    slots = operands.products.unflatten(1, (len(COUNTS), capacity))
    found = torch.cat([out[group, :count] for group, count in enumerate(counts)])
    wanted = torch.cat([slots[group, group, :count] for group, count in enumerate(counts)])
    return difference_of(found, wanted)
