"""What a grouped product refuses whatever its dtypes: its lists, shapes, groups and formats."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NoReturn

import torch

from mortise_npu_ascend.emulator.chip import current_chip
from mortise_npu_ascend.emulator.group_lists import GroupListKind
from mortise_npu_ascend.emulator.grouped_call import (
    INNER_AXIS,
    NO_GROUPS,
    ROWS,
    GroupedCall,
    inner_size,
    weight_shape,
)
from mortise_npu_ascend.emulator.grouped_modes import ACTIVATIONS, MODES, WORDS, Mode
from mortise_npu_ascend.emulator.rejections import device_name, not_emulated, reject, require

if TYPE_CHECKING:
    from collections.abc import Sequence

OPERATOR: Final = "npu_grouped_matmul"

LARGEST_AXIS: Final = 65535
"""Of the contiguous axis of rows and weights."""

_FLOAT8: Final = frozenset({torch.float8_e4m3fn, torch.float8_e5m2})

# Multiples of the inner axis and of the columns that FRACTAL_NZ needs, by dtype of the weight.
_TILES: Final = (
    (torch.int8, (16, 32)),
    (torch.bfloat16, (16, 16)),
    (torch.float16, (16, 16)),
    (WORDS, (16, 64)),
)


def refuse(call: GroupedCall, reason: str) -> NoReturn:
    """Refuse as the vendor's library does, which names its entry first."""
    reject(call.operator, f"In op [{call.kernel}], {reason}", kernel=call.kernel)


def refuse_unless(condition: bool, call: GroupedCall, reason: str) -> None:
    """:func:`refuse` unless a condition holds."""
    if not condition:
        refuse(call, reason)


def check_arguments(
    x: Sequence[torch.Tensor],
    weight: Sequence[torch.Tensor],
    split_item: int | None,
    group_type: int | None,
    group_list_type: int | None,
    act_type: int | None,
) -> None:
    """Refuse what torch_npu refuses before it calls the vendor's library.

    Raises:
        RuntimeError: with the reason.
    """
    require(
        len(x) > 0 and len(weight) > 0,
        OPERATOR,
        "The number of x and weight should be greater than 0, but they are "
        f"{len(x)} and {len(weight)}.",
    )
    require(
        split_item in (0, 1, 2, 3),
        OPERATOR,
        f"Invalid value of split_item [{split_item}], which should only be one of 0/1/2/3.",
    )
    if group_type is None:
        reject(OPERATOR, "Requires manual passing group_type, current is None.")
    require(
        group_type in (NO_GROUPS, ROWS, INNER_AXIS),
        OPERATOR,
        f"group_type only supports -1, 0 and 2, but got {group_type}",
    )
    require(
        group_list_type in tuple(GroupListKind),
        OPERATOR,
        f"[groupListType] is not supported, got [{group_list_type}].",
    )
    require(act_type in ACTIVATIONS, OPERATOR, f"[actType] is not supported, got [{act_type}].")


def mode_of(call: GroupedCall) -> Mode:
    """The mode that the dtypes ask for.

    Raises:
        RuntimeError: no mode of this generation has them, as when int8 rows meet bf16 weights.
    """
    x, weight = call.x[0].dtype, call.weight[0].dtype
    mode = MODES.get((x, weight))
    if mode is None and current_chip().facts.float8 and {x, weight} & _FLOAT8:
        not_emulated(call.operator, f"x of {device_name(x)} with weights of {device_name(weight)}")
    if mode is None or (mode is Mode.A4W4 and not current_chip().facts.int4_rows):
        _refuse_pair(call)
    for name, tensors, dtype in (("x", call.x, x), ("weight", call.weight, weight)):
        refuse_unless(
            all(tensor.dtype == dtype for tensor in tensors),
            call,
            f"the tensors of [{name}] must have one data type.",
        )
    return mode


def _refuse_pair(call: GroupedCall) -> NoReturn:
    x, weight = (_operand_name(tensors[0].dtype) for tensors in (call.x, call.weight))
    if call.is_tiled:
        reason = (
            f"x dtype {x} and weight dtype {weight} do not match with required dtype when the "
            "weight format is FRACTAL_NZ. Only supported scenarios: A8W8 quant, non-quant "
            "BF16/FP16, A8W4 weight quant, A4W4 quant and A16W4 antiquant"
        )
    else:
        reason = (
            f"there is no matching x dtype {x} and weight dtype {weight} pattern. Supported "
            "scenarios include A8W8 quant, A8W4 weight quant, A4W4 quant, A16W8 antiquant, A16W4 "
            "antiquant and non-quant"
        )
    refuse(call, f"the data types of [x, weight...] are mismatched, the reason is: [{reason}].")


def _operand_name(dtype: torch.dtype) -> str:
    return "DT_INT4" if dtype == WORDS else device_name(dtype)


def check_shapes(call: GroupedCall) -> None:
    """Refuse rows and weights that do not fit each other or are too large.

    Raises:
        RuntimeError: with the axis.
    """
    stacked = call.is_stacked
    for index, weight in enumerate(call.weight):
        refuse_unless(
            weight.ndim == (3 if stacked else 2),
            call,
            f"weight[{index}] dim num should be 2 or one of 3, but now is {weight.ndim}.",
        )
    shapes = [weight_shape(weight) for weight in call.weight]
    refuse_unless(
        len({shape.is_transposed for shape in shapes}) == 1,
        call,
        "The transpose state must be the same for each tensor in weight.",
    )
    refuse_unless(
        len(call.x) in (1, len(call.weight)),
        call,
        f"tensor list lengths are mismatched, got [x size {len(call.x)}, weight size "
        f"{len(call.weight)}].",
    )
    refuse_unless(
        call.group_type == NO_GROUPS or len({shape.columns for shape in shapes}) == 1,
        call,
        "the N axis of each tensor in weight must be equal.",
    )
    for index, rows in enumerate(call.x):
        refuse_unless(
            rows.ndim == 2,
            call,
            f"x[{index}] dim num should be 2 in this case, but now is {rows.ndim}.",
        )
        shape = shapes[index if len(call.x) > 1 else 0]
        refuse_unless(
            inner_size(rows) == shape.inner,
            call,
            f"Dim 1 value of x[{index}] {inner_size(rows)} should be equal with K of weight "
            f"{shape.inner}.",
        )
        _check_axis(call, "x", inner_size(rows))
    for shape in shapes:
        _check_axis(call, "weight", shape.inner if shape.is_transposed else shape.columns)
    if call.is_tiled:
        _check_tiles(call)


def check_split(call: GroupedCall) -> None:
    """Refuse a kind of grouping that does not go with the kind of result.

    Raises:
        RuntimeError: ``split_item``, ``group_type`` and the lists contradict each other.
    """
    single = call.split_item in (2, 3)
    if call.group_type == NO_GROUPS:
        refuse_unless(
            not single,
            call,
            "when groupType == -1(no split) and y is separated, [splitItem] is invalid, got "
            f"[{call.split_item}]. Constraint:[splitItem should be 0 or 1].",
        )
        refuse_unless(
            call.group_list is None,
            call,
            "when groupType == -1(no split), [groupListOptional] must be nullptr.",
        )
        refuse_unless(
            not call.is_stacked and len(call.x) == len(call.weight),
            call,
            "when groupType == -1(no split) and x/weight are separated, tensor list lengths are "
            f"mismatched, got [x size {len(call.x)}, weight size {len(call.weight)}].",
        )
        return
    refuse_unless(
        single,
        call,
        f"when groupType == {call.group_type} and y is not separated, [splitItem] is invalid, got "
        f"[{call.split_item}]. Constraint:[splitItem should be 2 or 3].",
    )
    if call.group_type == INNER_AXIS:
        refuse_unless(
            len(call.x) == len(call.weight) == 1 and not call.is_stacked and call.bias is None,
            call,
            "when groupType == 2(split-K), one x and one weight of dim num 2 are supported, "
            "without bias.",
        )


def _check_axis(call: GroupedCall, name: str, size: int) -> None:
    refuse_unless(
        size <= LARGEST_AXIS,
        call,
        f"the last axis of {name}[0] should less or equal to {LARGEST_AXIS}, but now is {size}.",
    )


def _check_tiles(call: GroupedCall) -> None:
    shape = weight_shape(call.weight[0])
    tiles = dict(_TILES).get(call.weight[0].dtype)
    if tiles is None:
        _refuse_pair(call)
    inner, columns = reversed(tiles) if shape.is_transposed else tiles
    refuse_unless(
        shape.inner % inner == 0 and shape.columns % columns == 0,
        call,
        f"When weight format is FRACTAL_NZ, weight'shape(k[{shape.inner}], n[{shape.columns}]) "
        "should be divisible by the following shape: INT8:[16, 32],BF16/FP16[16, 16],INT4[16, 64].",
    )
