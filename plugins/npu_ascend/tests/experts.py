"""Random experts in every scheme that the device serves, and rows for them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from tests.fixtures.scheme_storages import Storage, random_weight

from mortise.formats.integer import quantise_int_rows
from mortise.plugin import (
    DecisionRule,
    DispatchDecision,
    DispatchDtype,
    DispatchedTokens,
    DispatchFormat,
    ExpertWeights,
    GroupListKind,
    ScaleFormat,
    ScaleLayout,
    StoredWeight,
    WeightScheme,
)
from mortise_npu_ascend import vendor
from mortise_npu_ascend.dispatch import Generation
from mortise_npu_ascend.options import read_options

if TYPE_CHECKING:
    from plugins.npu_ascend.tests.balls import Chip

    from mortise_npu_ascend.vendor import Vendor

LAYER = "model.layers.3.mlp"
GROUP_SIZE = 32

FORMS = {
    "float": Storage(WeightScheme.FLOAT),
    "w8a8": Storage(WeightScheme.W8A8),
    "w4a8": Storage(WeightScheme.W4A8),
    "w4a8 grouped": Storage(WeightScheme.W4A8, group_size=GROUP_SIZE),
    "w4a4": Storage(WeightScheme.W4A4),
    "w4a4 grouped": Storage(WeightScheme.W4A4, group_size=GROUP_SIZE),
    "w4a16": Storage(WeightScheme.W4A16),
    "w4a16 grouped": Storage(WeightScheme.W4A16, group_size=GROUP_SIZE),
}
"""How a projection may be stored."""

BF16 = DispatchFormat(dtype=DispatchDtype.BF16)
FP32 = DispatchFormat(dtype=DispatchDtype.FP32)
INT8 = DispatchFormat(
    dtype=DispatchDtype.INT8,
    scale_layout=ScaleLayout.PER_TOKEN,
    scale_format=ScaleFormat.FLOAT32,
)
DECISION = DispatchDecision(format=BF16, rule=DecisionRule.DEVICE_DEFAULT, reason="")


@dataclass(frozen=True)
class Sizes:
    hidden: int = 192
    intermediate: int = 96
    num_experts: int = 3

    def __str__(self) -> str:
        return f"{self.num_experts}x{self.hidden}x{self.intermediate}"


def on(chip: Chip, **options: object) -> Vendor:
    """The operators of an emulated chip."""
    table = {"generation": chip.generation.value, "strict": chip.strict, **options}
    return vendor.load("emulated", read_options(table), 0)


def serves(chip: Chip, *forms: str) -> bool:
    """Whether a chip takes experts of these forms: the A5 takes no int4 rows."""
    return chip.generation is not Generation.A5 or not any("w4a4" in form for form in forms)


def random_experts(
    w13: str, w2: str, sizes: Sizes, seed: int = 0, dtype: torch.dtype = torch.bfloat16
) -> ExpertWeights:
    """Experts whose outputs are about as large as their inputs."""
    return ExpertWeights(
        layer=LAYER,
        w13=_random(w13, 2 * sizes.intermediate, sizes.hidden, 2, sizes, seed, dtype),
        w2=_random(w2, sizes.hidden, sizes.intermediate, 1, sizes, seed + 1, dtype),
        num_local_experts=sizes.num_experts,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
    )


def _random(
    form: str, rows: int, columns: int, parts: int, sizes: Sizes, seed: int, dtype: torch.dtype
) -> StoredWeight:
    return random_weight(
        FORMS[form],
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


def plain_tokens(
    counts: list[int],
    hidden: int,
    *,
    behind: int = 0,
    seed: int = 5,
    dtype: torch.dtype = torch.bfloat16,
) -> DispatchedTokens:
    """Unquantised rows, and some that belong to no group."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(sum(counts) + behind, hidden, generator=generator)
    return DispatchedTokens(
        rows=rows.to(dtype),
        scales=None,
        group_list=torch.tensor(counts, dtype=torch.int64),
        group_list_kind=GroupListKind.COUNTS,
        group_counts=None,
        format=BF16 if dtype is torch.bfloat16 else FP32,
    )


def quantised(tokens: DispatchedTokens) -> DispatchedTokens:
    """The same as int8 rows, as an exchange quantises them."""
    rows, scales = quantise_int_rows(tokens.rows, 8)
    return replace(tokens, rows=rows, scales=scales, format=INT8)


def cumulative(tokens: DispatchedTokens) -> DispatchedTokens:
    """The same with a list of ends."""
    return replace(
        tokens,
        group_list=tokens.group_list.cumsum(0),
        group_list_kind=GroupListKind.CUMULATIVE,
    )
