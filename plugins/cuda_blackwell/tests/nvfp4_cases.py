"""Experts, rows and groups for the tests of NVFP4, made from a seed."""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from mortise.formats.nvfp4 import dequantise_nvfp4, global_scale_of, quantise_nvfp4
from mortise.plugin import StoredWeight, WeightScheme
from mortise_cuda_common.groups import Groups

if TYPE_CHECKING:
    from collections.abc import Callable

    from mortise_cuda_common.programs.base import Programs

BF16 = torch.bfloat16
Thing = TypeVar("Thing")


@dataclass(frozen=True)
class Machine:
    """What runs programs, and how far sums may be off on it.

    Args:
        programs: runs them.
        device: where their operands are.
        has_fp4: whether its tensor cores multiply float4.
        sums: relative error of one addition within a product.
    """

    programs: Programs
    device: torch.device
    has_fp4: bool
    sums: float

    def run(self, function: Callable[..., Thing], *arguments: Any) -> Thing:
        """Call with operands on the device; the result is on the host."""
        there = [moved(argument, self.device) for argument in arguments]
        return moved(function(self.programs, *there), torch.device("cpu"))


def moved(thing: Any, device: torch.device) -> Any:
    """A tensor, or a record with tensors in it, on a device."""
    if isinstance(thing, torch.Tensor):
        return thing.to(device)
    if is_dataclass(thing) and not isinstance(thing, type):
        parts = {one.name: moved(getattr(thing, one.name), device) for one in fields(thing)}
        return replace(thing, **parts)
    return thing


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=generator(seed)).to(dtype)


def stored_weight(
    seed: int,
    experts: int,
    rows: int,
    columns: int,
    *,
    num_parts: int = 1,
    static_input: bool = True,
) -> StoredWeight:
    """A weight ``[E, N, K]`` whose parts, and experts, have global scales far from each other."""
    spread = torch.rand(experts, num_parts, 1, 1, generator=generator(seed)) * 20 + 0.1
    weight = normal(seed, experts, num_parts, rows // num_parts, columns) * spread
    global_scale = global_scale_of(weight.abs().amax(dim=(2, 3)))
    packed, scale = quantise_nvfp4(weight, global_scale[..., None, None])
    input_scale = None
    if static_input:
        input_scale = torch.rand(experts, num_parts, generator=generator(seed + 1)) * 1e-3 + 1e-3
    return StoredWeight(
        scheme=WeightScheme.NVFP4,
        weight=packed.flatten(1, 2),
        scale=scale.view(torch.uint8).flatten(1, 2).view(torch.float8_e4m3fn),
        global_scale=global_scale,
        input_scale=input_scale,
        num_parts=num_parts,
    )


def groups_of(counts: list[int], *, alignment: int = 1, capacity: int | None = None) -> Groups:
    """Groups of so many rows, one after the other, or in slots of equal capacity."""
    sizes = torch.tensor(counts, dtype=torch.int32)
    if capacity is not None:
        first = torch.arange(len(counts), dtype=torch.int32) * capacity
        num_rows = len(counts) * capacity
    else:
        padded = (sizes + alignment - 1) // alignment * alignment
        first = (padded.cumsum(0) - padded).to(torch.int32)
        num_rows = int(padded.sum()) + 3  # rows of no group at the end
    return Groups(
        first_rows=first, counts=sizes, num_rows=num_rows, alignment=alignment, capacity=capacity
    )


def places(groups: Groups) -> list[slice]:
    """Where the rows of each group are."""
    pairs = zip(groups.first_rows.tolist(), groups.counts.tolist(), strict=True)
    return [slice(first, first + count) for first, count in pairs]


def poisoned(rows: torch.Tensor, groups: Groups) -> torch.Tensor:
    """A copy of rows whose undefined ones are NaN (float) or ones (bytes)."""
    result = torch.full_like(rows.view(torch.uint8), 0xFF).view(rows.dtype)
    for place in places(groups):
        result[place] = rows[place]
    return result


def dequantised(stored: StoredWeight, expert: int) -> torch.Tensor:
    """float64 ``[N, K]``."""
    assert stored.scale is not None and stored.global_scale is not None
    values = dequantise_nvfp4(stored.weight[expert], stored.scale[expert], 1.0).double()
    factors = stored.global_scale[expert].double()
    return values * factors.repeat_interleave(len(values) // len(factors)).unsqueeze(1)
