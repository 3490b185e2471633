"""What a grouped product refuses in each of its modes, by one function a mode."""

from __future__ import annotations

import warnings
from typing import Final

import torch

from mortise_npu_ascend.emulator.chip import current_chip
from mortise_npu_ascend.emulator.group_lists import GroupListKind
from mortise_npu_ascend.emulator.grouped_arguments import (
    check_bias,
    check_columns,
    check_dtype,
    check_group_size,
    check_result,
    check_row_scale,
    first,
    must_be_given,
    must_be_none,
    must_be_single,
    num_groups,
)
from mortise_npu_ascend.emulator.grouped_call import INNER_AXIS, ROWS, GroupedCall
from mortise_npu_ascend.emulator.grouped_checks import OPERATOR, refuse, refuse_unless
from mortise_npu_ascend.emulator.grouped_int4 import (
    SIXTEEN_BITS,
    check_assisted,
    check_int4,
    check_rescaled,
)
from mortise_npu_ascend.emulator.grouped_modes import (
    GROUPED_FACTS,
    INT4_WEIGHTS,
    WEIGHT_ONLY,
    GroupedFacts,
    Mode,
)
from mortise_npu_ascend.emulator.rejections import device_name


def check_mode(call: GroupedCall, mode: Mode) -> None:
    """Refuse scales, biases, results and activations that a mode does not take.

    Raises:
        RuntimeError: with the words of the device.
    """
    facts = GROUPED_FACTS[current_chip().generation]
    _check_group_type(call, mode)
    _check_group_list_type(call, mode, facts)
    _check_activation(call, mode)
    if mode is Mode.FLOAT:
        _check_float(call, facts)
    elif mode is Mode.A8W8:
        _check_int8(call, facts)
    elif mode is Mode.A4W4:
        check_int4(call)
    elif mode in WEIGHT_ONLY:
        _check_weight_only(call, mode, facts)
    elif facts.assist_bias:
        check_assisted(call)
    else:
        check_rescaled(call)


def _check_group_type(call: GroupedCall, mode: Mode) -> None:
    if mode is Mode.FLOAT or call.group_type == ROWS:
        return
    refuse_unless(
        call.group_type != INNER_AXIS,
        call,
        f"when groupType == 2(split-K), [{mode}] is not supported.",
    )
    refuse_unless(
        mode in WEIGHT_ONLY,
        call,
        f"[{mode}] only supports split-M with single x, single weight and single y.",
    )


def _check_group_list_type(call: GroupedCall, mode: Mode, facts: GroupedFacts) -> None:
    if call.group_list_type == GroupListKind.PAIRS:
        refuse_unless(
            call.group_type == ROWS and (facts.pairs_for_float or mode is Mode.A8W8),
            call,
            f"when {mode}, [sparse groupListType] is not supported.",
        )
    if reads_counts_only(mode) and call.group_list_type != GroupListKind.COUNTS:
        warnings.warn(
            f"{OPERATOR}: when A8W4 quant, groupListType {call.group_list_type} is not supported "
            "and read as 1 (count)",
            RuntimeWarning,
            stacklevel=2,
        )


def reads_counts_only(mode: Mode) -> bool:
    """Whether the kernel takes a group list for counts, whatever the caller says it is."""
    return mode is Mode.A8W4 and GROUPED_FACTS[current_chip().generation].assist_bias


def _check_activation(call: GroupedCall, mode: Mode) -> None:
    """The older generations ignore an activation that their kernels lack, and say so in a log."""
    if call.act_type == 0 or (mode is Mode.A8W8 and call.out_dtype in SIXTEEN_BITS):
        return
    ignored = mode is Mode.A8W8 or mode in INT4_WEIGHTS
    if ignored and GROUPED_FACTS[current_chip().generation].ignores_activations:
        reason = f"actType[{call.act_type}] is not supported in this quant scenario"
        warnings.warn(f"{OPERATOR}: {reason} and ignored", RuntimeWarning, stacklevel=2)
        return
    refuse(
        call,
        f"when {mode}, [activeType] is not supported, got [{call.act_type}]. "
        "Constraint:[activation is not supported].",
    )


_UNUSED_BY_FLOAT: Final = (
    "scale",
    "offset",
    "antiquant_scale",
    "antiquant_offset",
    "per_token_scale",
)


def _check_float(call: GroupedCall, facts: GroupedFacts) -> None:
    dtype = call.x[0].dtype
    must_be_none(call, Mode.FLOAT, *_UNUSED_BY_FLOAT)
    check_result(call, Mode.FLOAT, (dtype,))
    check_bias(call, Mode.FLOAT, facts.float_bias[dtype])


def _check_int8(call: GroupedCall, facts: GroupedFacts) -> None:
    must_be_single(call, Mode.A8W8)
    must_be_none(call, Mode.A8W8, "antiquant_scale", "antiquant_offset")
    check_result(call, Mode.A8W8, tuple(facts.int8_bias))
    check_bias(call, Mode.A8W8, facts.int8_bias[call.out_dtype])
    if call.out_dtype == torch.int32:
        return
    must_be_none(call, Mode.A8W8, "offset")
    must_be_given(call, Mode.A8W8, "scale")
    _check_int8_scale(call, facts)
    check_columns(call, "scale")
    check_row_scale(call, Mode.A8W8)
    refuse_unless(
        not (call.is_tiled and call.out_dtype == torch.int8),
        call,
        "when A8W8 quant, y dtype DT_INT8 is not supported with a weight in FRACTAL_NZ.",
    )


def _check_int8_scale(call: GroupedCall, facts: GroupedFacts) -> None:
    scale = first(call, "scale").dtype
    has_rows = call.per_token_scale is not None
    pairs = current_chip().facts.int8_outputs if has_rows else facts.scale_outputs
    refuse_unless(
        (scale, call.out_dtype) in pairs,
        call,
        f"the data types of [scale, y...] are mismatched, the reason is: [scale[0] dtype "
        f"{device_name(scale)} and y dtype {device_name(call.out_dtype)} are not supported when "
        f"A8W8 {'per-token' if has_rows else 'per-channel'} quant].",
    )


def _check_weight_only(call: GroupedCall, mode: Mode, facts: GroupedFacts) -> None:
    dtype = call.x[0].dtype
    must_be_none(call, mode, "scale", "offset", "per_token_scale")
    must_be_given(call, mode, "antiquant_scale")
    if facts.offset_of_int8 and not (mode is Mode.A16W4 and call.is_stacked):
        must_be_given(call, mode, "antiquant_offset")
    check_result(call, mode, (dtype,))
    check_bias(call, mode, facts.weight_only_bias[dtype])
    for name in ("antiquant_scale", "antiquant_offset"):
        if getattr(call, name) is not None:
            check_dtype(call, mode, name, dtype)
            check_columns(call, name, groups=mode is Mode.A16W4)
    sizes = facts.weight_only_groups
    limited = bool(sizes) and num_groups(call, "antiquant_scale") > 1
    check_group_size(
        call,
        "antiquant_scale",
        lambda size: not limited or size in sizes,
        f"antiquantGroupSize should be one of {sorted(sizes)}" if limited else "G divides k",
    )
