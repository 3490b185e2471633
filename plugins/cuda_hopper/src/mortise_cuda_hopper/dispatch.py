"""Which rows travel between Hopper GPUs, and what becomes of other formats."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType
from typing import Final

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

POLICY: Final = DispatchPolicy(
    device="Hopper",
    default=DispatchDtype.FP8_E4M3,
    actions=MappingProxyType(
        {
            # A float32 model is run to be exact, so its rows are not rounded to a format that
            # nobody asked for. DeepEP carries no float32: such a layer goes through the core's own
            # exchange, over NCCL.
            DispatchDtype.FP32: Exact(),
            DispatchDtype.BF16: Exact(),
            DispatchDtype.FP8_E4M3: Exact(),
            DispatchDtype.INT8: Substitute(
                DispatchDtype.FP8_E4M3, "its exchange quantises to fp8, never to int8"
            ),
            DispatchDtype.NVFP4: Refuse("it has no fp4 units"),
        }
    ),
    row_layouts=MappingProxyType(
        {DispatchMode.NORMAL: RowLayout.GROUPED_ALIGNED, DispatchMode.LOW_LATENCY: RowLayout.MASKED}
    ),
    # DeepGEMM's default: the rows of one tile of its grouped product belong to one expert.
    alignment=128,
)


def resolve_dispatch_dtype(
    request: DispatchRequest, alignment: int = POLICY.alignment
) -> DispatchDecision:
    """Keep to the order of authority; when nobody asks, rows travel as fp8.

    Args:
        request: of the layer.
        alignment: rows to which groups are padded, as the product that takes them wants it.

    Raises:
        ConfigError: the user's override cannot be sent, or not consumed by the layer's experts.
        BackendUnusableError: the same of a format that the user did not ask for.
    """
    return decide_by_authority(request, replace(POLICY, alignment=alignment))
