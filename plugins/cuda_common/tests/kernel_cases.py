"""Grouped rows with poison where no group has any, weights for them, and float64 to judge by."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from hypothesis import strategies as st

from mortise.formats.fp8 import (
    E4M3_MAX,
    GROUP,
    ceil_to_ue8m0,
    dequantise_fp8_rows,
    quantise_fp8_rows,
    to_e4m3,
)
from mortise.formats.weights import quantise_weight
from mortise.plugin import ScaleFormat, StoredWeight, WeightScheme
from mortise_cuda_common.groups import Groups
from mortise_cuda_common.rows import Kind, Rows

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mortise_cuda_common.kernels.tilings import Tiling
    from mortise_cuda_common.programs.base import Programs

BF16 = torch.bfloat16
FORMATS = (ScaleFormat.FLOAT32, ScaleFormat.UE8M0)
POISON = 0xFF
STEEPEST_SILU = 1.1
HALF = {torch.float32: 2.0**-24, BF16: 2.0**-8, torch.float8_e4m3fn: 2.0**-4}
"""Largest relative error of one rounding, where numbers are normal."""


@dataclass(frozen=True)
class Machine:
    """What runs the programs, and where.

    Args:
        fp8_sums: most that 128 products of e4m3 are off when they are added up, relative to the
            sum of their magnitudes.
        bf16_sums: the same of one product of bfloat16 and one addition.
        other: relative error of one exp or one division.
    """

    programs: Programs
    device: torch.device
    fp8_sums: float
    bf16_sums: float
    other: float

    def on(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.device)

    def groups(self, groups: Groups) -> Groups:
        return replace(groups, first_rows=self.on(groups.first_rows), counts=self.on(groups.counts))

    def rows(self, rows: Rows) -> Rows:
        assert rows.scales is not None
        # A transposed copy is the layout in which the programs write scales.
        return replace(rows, values=self.on(rows.values), scales=self.on(rows.scales))

    @property
    def is_emulated(self) -> bool:
        return self.device.type == "cpu"


def groups_of(counts: list[int], *, alignment: int = 1, capacity: int | None = None) -> Groups:
    """Groups of a layout, some rows behind the last group if it is not masked."""
    if capacity is not None:
        first_rows = [capacity * number for number in range(len(counts))]
        num_rows = capacity * len(counts)
    else:
        padded = [-(-count // alignment) * alignment for count in counts]
        first_rows = [sum(padded[:number]) for number in range(len(counts))]
        num_rows = sum(padded) + 5
    return Groups(
        first_rows=torch.tensor(first_rows, dtype=torch.int32),
        counts=torch.tensor(counts, dtype=torch.int32),
        num_rows=num_rows,
        alignment=alignment,
        capacity=capacity,
    )


@st.composite
def any_groups(draw: st.DrawFn) -> Groups:
    """Groups of any counts in any layout: empty ones, and one that has everything, among them."""
    counts = draw(st.lists(st.sampled_from([0, 0, 1, 3, 16, 17, 40]), min_size=1, max_size=5))
    layout = draw(st.sampled_from(["grouped", "aligned", "masked"]))
    if layout == "masked":
        return groups_of(counts, capacity=max(1, *counts) + draw(st.integers(0, 3)))
    return groups_of(counts, alignment=8 if layout == "aligned" else 1)


def places(groups: Groups) -> Iterator[tuple[int, slice]]:
    """Each group that has rows, and where."""
    firsts, counts = groups.first_rows.tolist(), groups.counts.tolist()
    for number, (first, count) in enumerate(zip(firsts, counts, strict=True)):
        if count:
            yield number, slice(first, first + count)


def undefined_rows(groups: Groups) -> torch.Tensor:
    """Bool ``[R]``."""
    undefined = torch.ones(groups.num_rows, dtype=torch.bool)
    for _, place in places(groups):
        undefined[place] = False
    return undefined


def poisoned(tensor: torch.Tensor, groups: Groups) -> torch.Tensor:
    """A copy whose undefined rows are not numbers."""
    copy = tensor.clone(memory_format=torch.contiguous_format)
    copy.unsqueeze(-1).view(torch.uint8)[undefined_rows(groups)] = POISON
    return copy


def is_untouched(tensor: torch.Tensor, groups: Groups) -> bool:
    """Whether undefined rows hold what an emulated chip's memory held before."""
    copy = tensor.contiguous().unsqueeze(-1).view(torch.uint8)
    return bool((copy[undefined_rows(groups)] == POISON).all())


def tiling_name(tiling: Tiling) -> str:
    return f"{tiling.block_m} x {tiling.block_n}"


def normal(seed: int, *shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


def fp8_rows(
    seed: int, groups: Groups, columns: int, scale_format: ScaleFormat = ScaleFormat.FLOAT32
) -> Rows:
    """Quantised rows, one of which is zero, with poison."""
    plain_RK = normal(seed, groups.num_rows, columns)
    plain_RK[::7] = 0
    values, scales = quantise_fp8_rows(plain_RK, scale_format)
    return Rows(
        values=poisoned(values, groups),
        kind=Kind.FP8 if scale_format is ScaleFormat.FLOAT32 else Kind.FP8_UE8M0,
        scales=poisoned(scales, groups).T.contiguous().T,
    )


def fp8_weight(seed: int, groups: Groups, rows: int, columns: int, parts: int) -> StoredWeight:
    plain = normal(seed, groups.num_groups, rows, columns) * columns**-0.5
    # Blocks of very different scales show one that is taken for another.
    plain *= 2.0 ** (torch.arange(rows) // 32 % 5)[:, None]
    plain *= 2.0 ** (torch.arange(columns) // 128 % 3)
    return quantise_weight(plain, WeightScheme.FP8_BLOCK, num_parts=parts)


def dequantised(rows: Rows, place: slice) -> torch.Tensor:
    assert rows.scales is not None
    return dequantise_fp8_rows(rows.values[place], rows.scales[place], torch.float64)


@dataclass(frozen=True)
class Near:
    """Numbers in float64, and how far off each may be."""

    center: torch.Tensor
    radius: torch.Tensor

    def rounded(self, dtype: torch.dtype) -> Near:
        return Near(self.center, self.radius + HALF[dtype] * (self.center.abs() + self.radius))

    def holds(self, found: torch.Tensor) -> bool:
        return bool(((found.double() - self.center).abs() <= self.radius + 1e-12).all())


def sums(rows_RK: torch.Tensor, weight_NK: torch.Tensor, error: float) -> Near:
    """A product whose relative error is that of the sum of its magnitudes."""
    rows_RK, weight_NK = rows_RK.double(), weight_NK.double()
    return Near(rows_RK @ weight_NK.T, error * (rows_RK.abs() @ weight_NK.abs().T))


def fp8_error(machine: Machine, columns: int) -> float:
    """128 products are added up, scaled by a product of two scales, and added up again."""
    return machine.fp8_sums + (-(-columns // GROUP) + 3) * HALF[torch.float32]


def swiglu(gate_up: Near, machine: Machine) -> Near:
    """silu(gate) * up in float32: an exp, a sum, a division and a product."""
    gate, up = gate_up.center.chunk(2, dim=1)
    gate_radius, up_radius = gate_up.radius.chunk(2, dim=1)
    silu = F.silu(gate)
    radius = STEEPEST_SILU * gate_radius * (up.abs() + up_radius) + silu.abs() * up_radius
    error = 2 * machine.other + 3 * HALF[torch.float32]
    # The exp of a gate that is far from zero is off by what the gate's rounding makes of it.
    error = error + gate.abs() * HALF[torch.float32]
    center = silu * up
    return Near(center, radius + error * (center.abs() + radius))


def is_quantised(near: Near, rows: Rows, place: slice, scale_format: ScaleFormat) -> bool:
    """Whether e4m3 rows are what some numbers within reach are quantised to."""
    assert rows.scales is not None
    scale_RC, values = rows.scales[place].double(), rows.values[place].float()
    low, high = (
        _scales(amax, scale_format)
        for amax in ((near.center.abs() - near.radius), near.center.abs() + near.radius)
    )
    scales_fit = ((low <= scale_RC) & (scale_RC <= high)).all()
    wide = scale_RC.repeat_interleave(GROUP, dim=1)[:, : values.shape[1]]
    slack = near.radius + 4 * HALF[torch.float32] * (near.center.abs() + near.radius)
    least = to_e4m3(((near.center - slack) / wide).clamp(-E4M3_MAX, E4M3_MAX)).float()
    most = to_e4m3(((near.center + slack) / wide).clamp(-E4M3_MAX, E4M3_MAX)).float()
    return bool(scales_fit and ((least <= values) & (values <= most)).all())


def _scales(magnitudes: torch.Tensor, scale_format: ScaleFormat) -> torch.Tensor:
    """Scales of groups with such magnitudes, a hair off where they are not powers of two."""
    padded = F.pad(magnitudes, (0, -magnitudes.shape[1] % GROUP))
    amax = padded.unflatten(1, (-1, GROUP)).amax(dim=-1).clamp(min=1e-10)
    scale = (amax / E4M3_MAX).float()
    return ceil_to_ue8m0(scale).double() if scale_format is ScaleFormat.UE8M0 else scale.double()


def difference(found: torch.Tensor, center: torch.Tensor) -> float:
    """How far two tensors are apart as a whole; DeepGEMM calls it calc_diff and wants 0.001."""
    found = found.double()
    norms = (found * found + center * center).sum()
    return float(1 - 2 * (found * center).sum() / norms) if norms else 0.0
