"""Random experts in the schemes of both chips, rows for them in every layout, and the judge."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from plugins.cuda_common.tests import fp8_balls as balls
from tests.fixtures.scheme_storages import Storage, random_weight

from mortise.formats.fp8 import pack_ue8m0, quantise_fp8_rows, unpack_ue8m0
from mortise.plugin import (
    DispatchDtype,
    DispatchedTokens,
    DispatchFormat,
    DispatchMode,
    ExpertWeights,
    GroupListKind,
    RowLayout,
    ScaleFormat,
    ScaleLayout,
    StoredWeight,
    WeightScheme,
)
from mortise_cuda_common.chip import EMULATED, Architecture
from mortise_cuda_common.libraries.deep_gemm import DeepGEMM
from mortise_cuda_common.products.select import Products
from mortise_cuda_common.programs.emulated import EmulatedPrograms
from mortise_cuda_common.runtime import Runtime

if TYPE_CHECKING:
    from collections.abc import Iterator

LAYER = "model.layers.3.mlp"
NOT_THERE = "no module named deep_gemm"

FORMS = {
    "float": Storage(WeightScheme.FLOAT),
    "fp8": Storage(WeightScheme.FP8_BLOCK),
    "fp8 powers": Storage(WeightScheme.FP8_BLOCK, scale_format=ScaleFormat.UE8M0),
    "w4a16": Storage(WeightScheme.W4A16),
    "w4a16 grouped": Storage(WeightScheme.W4A16, group_size=32),
}
"""How a projection may be stored."""

BF16 = DispatchFormat(dtype=DispatchDtype.BF16)
FP8 = DispatchFormat(
    dtype=DispatchDtype.FP8_E4M3,
    scale_layout=ScaleLayout.PER_TOKEN_128,
    scale_format=ScaleFormat.FLOAT32,
)


@dataclass(frozen=True)
class Machine:
    """A chip, and what the configuration asks for."""

    architecture: Architecture
    runner: str = "auto"
    deep_gemm: bool = True

    def __str__(self) -> str:
        return f"{self.architecture}-{self.runner}{'' if self.deep_gemm else '-without'}"

    def products(self) -> Products:
        return Products(runtime_of(self.architecture, deep_gemm=self.deep_gemm), self.runner)


SM90, SM100 = Architecture.SM90, Architecture.SM100
MACHINES = (
    Machine(SM90, "triton"),
    Machine(SM90, "deep_gemm"),
    Machine(SM100, "auto"),
    Machine(SM100, "deep_gemm"),
)


@dataclass(frozen=True)
class Sizes:
    """The smallest experts that DeepGEMM takes, unless said otherwise."""

    hidden: int = 256
    intermediate: int = 128
    num_experts: int = 3

    def __str__(self) -> str:
        return f"{self.num_experts}x{self.hidden}x{self.intermediate}"


TILED, UNEVEN = Sizes(), Sizes(hidden=160, intermediate=72)


def runtime_of(architecture: Architecture, *, deep_gemm: bool = True) -> Runtime:
    """An emulated chip."""
    chip = EMULATED[architecture]
    return Runtime(
        chip=chip,
        device=torch.device("cpu"),
        emulated=True,
        programs=EmulatedPrograms(),
        deep_gemm=DeepGEMM.emulated(chip) if deep_gemm else None,
        no_deep_gemm="" if deep_gemm else NOT_THERE,
    )


def random_experts(
    w13: str,
    w2: str,
    sizes: Sizes = TILED,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
) -> ExpertWeights:
    """Experts whose outputs are about as large as their inputs."""
    return ExpertWeights(
        layer=LAYER,
        w13=random_experts_weight(w13, 2 * sizes.intermediate, sizes.hidden, 2, sizes, seed, dtype),
        w2=random_experts_weight(w2, sizes.hidden, sizes.intermediate, 1, sizes, seed + 1, dtype),
        num_local_experts=sizes.num_experts,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
    )


def random_experts_weight(
    form: str,
    rows: int,
    columns: int,
    parts: int = 1,
    sizes: Sizes = TILED,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
) -> StoredWeight:
    storage = FORMS[form]
    if storage.group_size and columns % storage.group_size:
        storage = replace(storage, group_size=8)
    return random_weight(
        storage,
        rows,
        columns,
        num_parts=parts,
        leading=(sizes.num_experts,),
        seed=seed,
        float_dtype=dtype,
    )


def of_expert(stored: StoredWeight, expert: int) -> StoredWeight:
    """One expert's share."""
    scale = None if stored.scale is None else stored.scale[expert]
    return replace(stored, weight=stored.weight[expert].detach(), scale=scale)


def permuted(experts: ExpertWeights, order: list[int]) -> ExpertWeights:
    """The same experts in another order."""

    def of(stored: StoredWeight) -> StoredWeight:
        scale = None if stored.scale is None else stored.scale[order]
        bytes_wide = stored.weight.view(torch.uint8)[order].view(stored.weight.dtype)
        return replace(stored, weight=bytes_wide, scale=scale)

    return replace(experts, w13=of(experts.w13), w2=of(experts.w2), prepared=None)


def random_rows(
    counts: list[int], hidden: int, seed: int = 5, dtype: torch.dtype = torch.bfloat16
) -> list[torch.Tensor]:
    """Rows of each expert."""
    rows = torch.randn(sum(counts), hidden, generator=torch.Generator().manual_seed(seed))
    return list(rows.to(dtype).split(counts))


def grouped(
    rows: list[torch.Tensor],
    *,
    alignment: int = 1,
    behind: int = 0,
    host_counts: bool = True,
    cumulative: bool = False,
) -> DispatchedTokens:
    """Rows one expert after the other, and some behind them that are nobody's."""
    hidden, plain = rows[0].shape[1], BF16 if rows[0].dtype is torch.bfloat16 else None
    plain = plain or DispatchFormat(dtype=DispatchDtype.FP32)
    padded = [
        torch.cat((part, part.new_full((-len(part) % alignment, hidden), torch.nan)))
        for part in [*rows]
    ]
    tail = rows[0].new_full((behind, hidden), torch.nan)
    counts = torch.tensor([len(part) for part in rows], dtype=torch.int64)
    layout = RowLayout.GROUPED if alignment == 1 else RowLayout.GROUPED_ALIGNED
    return DispatchedTokens(
        rows=torch.cat((*padded, tail)),
        scales=None,
        group_list=counts.cumsum(0) if cumulative else counts,
        group_list_kind=GroupListKind.CUMULATIVE if cumulative else GroupListKind.COUNTS,
        group_counts=tuple(counts.tolist()) if host_counts else None,
        format=replace(plain, row_layout=layout, alignment=alignment),
    )


def masked(rows: list[torch.Tensor], capacity: int) -> DispatchedTokens:
    """Rows in slots, whose counts the device alone knows."""
    slots = rows[0].new_full((len(rows), capacity, rows[0].shape[1]), torch.nan)
    for slot, part in zip(slots, rows, strict=True):
        slot[: len(part)] = part
    plain = grouped(rows, host_counts=False)
    stated = replace(plain.format, row_layout=RowLayout.MASKED, mode=DispatchMode.LOW_LATENCY)
    return replace(plain, rows=slots, format=stated)


def layouts(rows: list[torch.Tensor]) -> dict[str, DispatchedTokens]:
    """The same rows in every layout, gaps undefined."""
    return {
        "grouped": grouped(rows, behind=3),
        "grouped, counts on the device": grouped(rows, behind=3, host_counts=False),
        "grouped, ends": grouped(rows, cumulative=True),
        "aligned": grouped(rows, alignment=128),
        "aligned to less": grouped(rows, alignment=8, behind=8, host_counts=False),
        "masked": masked(rows, 8),
        "masked, large slots": masked(rows, 128),
    }


def quantised(
    tokens: DispatchedTokens, scale_format: ScaleFormat = ScaleFormat.FLOAT32
) -> DispatchedTokens:
    """The same as float8 rows, as an exchange quantises them; undefined rows give such."""
    rows, scales = quantise_fp8_rows(tokens.rows, scale_format)
    if scale_format is ScaleFormat.UE8M0:
        scales = pack_ue8m0(scales)
    stated = replace(
        FP8,
        scale_format=scale_format,
        row_layout=tokens.format.row_layout,
        mode=tokens.format.mode,
        alignment=tokens.format.alignment,
    )
    return replace(tokens, rows=rows, scales=scales, format=stated)


def places(tokens: DispatchedTokens) -> list[torch.Tensor]:
    """Of each expert the places of its rows, if rows were flat."""
    counts = tokens.group_list
    if tokens.group_list_kind is GroupListKind.CUMULATIVE:
        counts = counts.diff(prepend=counts.new_zeros(1))
    found, start = [], 0
    for count in counts.tolist():
        found.append(torch.arange(start, start + count))
        is_masked = tokens.format.row_layout is RowLayout.MASKED
        alignment = tokens.format.alignment
        start += tokens.rows.shape[1] if is_masked else -(-count // alignment) * alignment
    return found


def defined(result: torch.Tensor, tokens: DispatchedTokens) -> torch.Tensor:
    """The results of rows of some expert, one after the other."""
    return result.flatten(0, -2)[torch.cat(places(tokens))]


def ball_of(tokens: DispatchedTokens, experts: ExpertWeights) -> balls.Ball:
    """Of the rows of all experts, one after the other."""
    parts = [
        balls.expert(
            _taken(tokens, place, experts.w13),
            of_expert(experts.w13, number),
            of_expert(experts.w2, number),
        )
        for number, place in enumerate(places(tokens))
        if len(place)
    ]
    return joined(parts)


def joined(parts: list[balls.Ball]) -> balls.Ball:
    names = ("center", "radius", "spread")
    return balls.Ball(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


def _taken(tokens: DispatchedTokens, place: torch.Tensor, w13: StoredWeight) -> balls.Ball:
    values = tokens.rows.flatten(0, -2)
    if tokens.scales is None:
        return balls.taken(balls.Ball.exactly(values[place]), w13)
    scales = tokens.scales.flatten(0, -2)[place]
    if scales.dtype is torch.int32:
        scales = unpack_ue8m0(scales, -(-values.shape[1] // 128))
    return balls.arrived(values.view(torch.uint8)[place].view(torch.float8_e4m3fn), scales)


def calc_diff(x: torch.Tensor, y: torch.Tensor) -> float:
    """How DeepGEMM's own tests compare: one minus the cosine-like similarity of two tensors."""
    x, y = x.double(), y.double()
    denominator = (x * x + y * y).sum()
    return float(1 - 2 * (x * y).sum() / denominator) if denominator else 0.0


def arrivals(experts: ExpertWeights, tokens: DispatchedTokens) -> Iterator[DispatchedTokens]:
    """The same rows in each format that the experts consume."""
    yield tokens
    if experts.w13.scheme is WeightScheme.FP8_BLOCK:
        yield quantised(tokens)
        yield quantised(tokens, ScaleFormat.UE8M0)
