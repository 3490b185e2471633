"""Which rows travel between Blackwell GPUs, and what becomes of other formats."""

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
    RowLayout,
    ScaleFormat,
    Substitute,
    decide_by_authority,
)

POLICY: Final = DispatchPolicy(
    device="Blackwell",
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
                DispatchDtype.FP8_E4M3, "its exchange quantises to fp8 or nvfp4, never to int8"
            ),
            DispatchDtype.NVFP4: Exact(),
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

    The scales of fp8 rows are powers of two whatever the weights' are: the tensor cores multiply by
    no others, and no product here cares.

    Args:
        request: of the layer.
        alignment: rows to which groups are padded, as the product that takes them wants it.

    Raises:
        ConfigError: the user's override cannot be sent, or not consumed by the layer's experts.
        BackendUnusableError: the same of a format that the user did not ask for.
    """
    decision = decide_by_authority(request, replace(POLICY, alignment=alignment))
    rows = decision.format
    if rows.dtype is not DispatchDtype.FP8_E4M3 or rows.scale_format is ScaleFormat.UE8M0:
        return decision
    return replace(
        decision,
        format=replace(rows, scale_format=ScaleFormat.UE8M0),
        reason=f"{decision.reason}; {POLICY.device} scales fp8 rows by powers of two",
    )
