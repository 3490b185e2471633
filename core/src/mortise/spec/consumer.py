"""The cheap check, at run time, that dispatched rows are what a layer's experts can consume."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from mortise.errors import ContractError
from mortise.spec.dispatch import (
    DispatchDtype,
    GroupListKind,
    RoutingWeightSide,
    RowLayout,
    ScaleLayout,
)
from mortise.spec.reasons import ReasonCode
from mortise.spec.weights import ScaleFormat, WeightScheme

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mortise.spec.dispatch import DispatchedTokens, DispatchFormat
    from mortise.spec.experts import ExpertWeights
    from mortise.spec.weights import StoredWeight

# By name, since a backend's module is read on machines where torch is not loaded yet.
ROW_DTYPES: Final[Mapping[DispatchDtype, str]] = MappingProxyType(
    {
        DispatchDtype.FP32: "torch.float32",
        DispatchDtype.BF16: "torch.bfloat16",
        DispatchDtype.FP8_E4M3: "torch.float8_e4m3fn",
        DispatchDtype.INT8: "torch.int8",
        DispatchDtype.NVFP4: "torch.uint8",
    }
)
"""The dtype of the tensor in which rows of each format travel."""

SCALE_DTYPES: Final[Mapping[ScaleFormat, str]] = MappingProxyType(
    {
        ScaleFormat.FLOAT32: "torch.float32",
        ScaleFormat.E4M3: "torch.float8_e4m3fn",
        ScaleFormat.UE8M0: "torch.int32",
    }
)
"""The dtype of the tensor in which scales of rows travel."""

SCALES: Final[Mapping[DispatchDtype, frozenset[tuple[ScaleLayout, ScaleFormat | None]]]] = (
    MappingProxyType(
        {
            DispatchDtype.FP32: frozenset({(ScaleLayout.NONE, None)}),
            DispatchDtype.BF16: frozenset({(ScaleLayout.NONE, None)}),
            DispatchDtype.FP8_E4M3: frozenset(
                {
                    (ScaleLayout.PER_TOKEN_128, ScaleFormat.FLOAT32),
                    (ScaleLayout.PER_TOKEN_128, ScaleFormat.UE8M0),
                }
            ),
            DispatchDtype.INT8: frozenset({(ScaleLayout.PER_TOKEN, ScaleFormat.FLOAT32)}),
            DispatchDtype.NVFP4: frozenset({(ScaleLayout.PER_BLOCK_16, ScaleFormat.E4M3)}),
        }
    )
)
"""The scales that rows of each format may have: their layout and their number format."""

CONSUMED: Final[Mapping[WeightScheme, frozenset[DispatchDtype]]] = MappingProxyType(
    {
        WeightScheme.FLOAT: frozenset(),
        WeightScheme.FP8_BLOCK: frozenset({DispatchDtype.FP8_E4M3}),
        WeightScheme.W8A8: frozenset({DispatchDtype.INT8}),
        WeightScheme.W4A8: frozenset({DispatchDtype.INT8}),
        WeightScheme.W4A4: frozenset(),
        WeightScheme.W4A16: frozenset(),
        WeightScheme.NVFP4: frozenset({DispatchDtype.NVFP4}),
    }
)
"""Quantised formats that a first projection of each scheme multiplies as they are."""

PLAIN: Final = frozenset({DispatchDtype.FP32, DispatchDtype.BF16})


def check_dispatched_tokens(tokens: DispatchedTokens, experts: ExpertWeights) -> None:
    """Compare rows with their own format and with the experts; looks at no element.

    Raises:
        ContractError: the format contradicts itself, dtype or scales are not what it says, or the
            experts of this layer cannot multiply such rows.
    """
    problem = (
        format_problem(tokens.format) or _rows_problem(tokens) or _experts_problem(tokens, experts)
    )
    if problem:
        what, expected = problem
        raise ContractError(
            f"layer {experts.layer}: {what}", reason=ReasonCode.CONTRACT_BROKEN, expected=expected
        )


def format_problem(format: DispatchFormat) -> tuple[str, str] | None:
    """What is wrong with a format itself, and what would be right; None where nothing is."""
    name, legal = format.dtype.value, SCALES[format.dtype]
    if (format.scale_layout, format.scale_format) not in legal:
        stated = scales_in_words(format.scale_layout, format.scale_format)
        return (
            f"a dispatch format of {name} rows states scales {stated}",
            " or ".join(sorted(scales_in_words(*scales) for scales in legal)),
        )
    if (format.global_scale is not None) is not (format.dtype is DispatchDtype.NVFP4):
        return (
            f"a dispatch format of {name} rows states the global scale {format.global_scale}",
            "a global scale for nvfp4 rows, and None for all others",
        )
    return None


def scales_in_words(layout: ScaleLayout, scale_format: ScaleFormat | None) -> str:
    """Layout and number format of scales, for a message."""
    return layout.value if scale_format is None else f"{layout.value} in {scale_format.value}"


def _rows_problem(tokens: DispatchedTokens) -> tuple[str, str] | None:
    stated, rows, scales = tokens.format, tokens.rows, tokens.scales
    name, dtype = stated.dtype.value, ROW_DTYPES[stated.dtype]
    if str(rows.dtype) != dtype:
        return f"rows of {rows.dtype} are said to be {name}", dtype
    if stated.scale_layout is ScaleLayout.NONE and scales is not None:
        return f"{name} rows came with scales", "no scales"
    if stated.scale_layout is not ScaleLayout.NONE:
        assert stated.scale_format is not None, "checked before"
        wanted = SCALE_DTYPES[stated.scale_format]
        if scales is None:
            return f"{name} rows came without scales", f"scales of {wanted}"
        if str(scales.dtype) != wanted:
            return f"{name} rows came with scales of {scales.dtype}", wanted
    dimensions = 3 if stated.row_layout is RowLayout.MASKED else 2
    if rows.dim() != dimensions:
        return f"{stated.row_layout.value} rows have {rows.dim()} dimensions", str(dimensions)
    if str(tokens.group_list.dtype) != "torch.int64":
        return f"the group list is {tokens.group_list.dtype}", "torch.int64"
    cumulative = tokens.group_list_kind is GroupListKind.CUMULATIVE
    if cumulative and stated.row_layout is RowLayout.GROUPED_ALIGNED:
        # Ends of padded groups, or of their rows? Counts leave nothing to guess.
        return "aligned groups came with a cumulative list", "counts of rows without padding"
    experts_multiply = tokens.routing_weight_side is RoutingWeightSide.EXPERTS
    if (tokens.row_weights is not None) is not experts_multiply:
        return "routing weights do not come with the rows", "weights where the experts multiply"
    return None


def _experts_problem(tokens: DispatchedTokens, experts: ExpertWeights) -> tuple[str, str] | None:
    scheme, dtype = experts.w13.scheme, tokens.format.dtype
    if scheme is WeightScheme.FLOAT and tokens.rows.dtype is not experts.w13.weight.dtype:
        return (
            f"{dtype.value} rows met {experts.w13.weight.dtype} weights",
            "unquantised rows of the weights' dtype",
        )
    consumed = PLAIN | _quantised(experts.w13)
    if dtype not in consumed:
        expected = f"one of {', '.join(sorted(consumed))}"
        static = "" if experts.w13.input_scale is None else " with a static scale of their input"
        return f"{dtype.value} rows met {scheme.value} weights{static}", expected
    num_groups = tokens.group_list.shape[0]
    if num_groups != experts.num_local_experts:
        return (
            f"a group list of {num_groups} met {experts.num_local_experts} experts",
            "one entry for each local expert",
        )
    return None


def _quantised(stored: StoredWeight) -> frozenset[DispatchDtype]:
    """The quantised formats that a first projection multiplies as they are."""
    static = stored.input_scale is not None
    if stored.scheme is WeightScheme.W8A8 and static:
        return frozenset()  # a scale per row is not the static one
    if stored.scheme is WeightScheme.NVFP4 and not static:
        return frozenset()  # the weights alone are quantised
    return CONSUMED[stored.scheme]
