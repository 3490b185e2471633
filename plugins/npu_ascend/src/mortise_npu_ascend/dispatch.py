"""Which rows travel between Ascend devices, by generation, and what becomes of other formats."""

from __future__ import annotations

from enum import StrEnum
from types import MappingProxyType
from typing import Final, assert_never

from mortise.plugin import (
    DispatchDecision,
    DispatchDtype,
    DispatchMode,
    DispatchPolicy,
    DispatchRequest,
    Exact,
    Refuse,
    RowLayout,
    Substitute,
    decide_by_authority,
)


class Generation(StrEnum):
    """Generations of the chip whose answers differ."""

    A2 = "A2"
    """Atlas A2, soc version ``Ascend910B*``."""
    A3 = "A3"
    """Atlas A3, soc version ``Ascend910_93*``."""
    A5 = "A5"
    """Atlas 950, soc version ``Ascend950*``."""


# Both exchanges deliver rows without gaps, one expert after the other, with a count for each.
_ROW_LAYOUTS: Final = MappingProxyType(
    {DispatchMode.NORMAL: RowLayout.GROUPED, DispatchMode.LOW_LATENCY: RowLayout.GROUPED}
)

# A float32 model is run to be exact, so its rows are not rounded to a format that nobody asked for.
# The vendor's exchange carries no float32: such a layer goes through the core's own, over HCCL.
_FP32: Final = Exact()

A2_A3: Final = DispatchPolicy(
    device="Ascend A2/A3",
    default=DispatchDtype.BF16,
    actions=MappingProxyType(
        {
            DispatchDtype.FP32: _FP32,
            DispatchDtype.BF16: Exact(),
            DispatchDtype.INT8: Exact(),
            DispatchDtype.FP8_E4M3: Substitute(
                DispatchDtype.INT8, "neither its exchange nor its matrix units know fp8"
            ),
            DispatchDtype.NVFP4: Refuse("neither its exchange nor its matrix units know float4"),
        }
    ),
    row_layouts=_ROW_LAYOUTS,
)

A5: Final = DispatchPolicy(
    device="Ascend A5",
    default=DispatchDtype.BF16,
    actions=MappingProxyType(
        {
            DispatchDtype.FP32: _FP32,
            DispatchDtype.BF16: Exact(),
            DispatchDtype.INT8: Exact(),
            # npu_moe_distribute_dispatch_v2 with quant_mode 3: a scale for each 128 columns. The
            # mode that quantises per token would be another format.
            DispatchDtype.FP8_E4M3: Exact(),
            DispatchDtype.NVFP4: Refuse(
                "its float4 has a power-of-two scale for 32 columns, not an e4m3 one for 16"
            ),
        }
    ),
    row_layouts=_ROW_LAYOUTS,
)


def policy(generation: Generation) -> DispatchPolicy:
    """What devices of one generation send."""
    match generation:
        case Generation.A2 | Generation.A3:
            return A2_A3
        case Generation.A5:
            return A5
        case _:
            assert_never(generation)


def resolve_dispatch_dtype(request: DispatchRequest, generation: Generation) -> DispatchDecision:
    """Keep to the order of authority; when nobody asks, rows travel as bf16.

    Raises:
        ConfigError: the user's override cannot be sent, or not consumed by the layer's experts.
        BackendUnusableError: the same of a format that the user did not ask for.
    """
    return decide_by_authority(request, policy(generation))
