"""What the grouped product that ends in the sum of each token's rows refuses."""

# M rows, S rows of the shared expert, B rows of the result, N columns, E experts.

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from mortise_npu_ascend.emulator.chip import current_chip
from mortise_npu_ascend.emulator.grouped_arguments import (
    check_bias,
    check_columns,
    check_dtype,
    check_row_scale,
    first,
    must_be_given,
    must_be_none,
    num_groups,
)
from mortise_npu_ascend.emulator.grouped_call import weight_shape
from mortise_npu_ascend.emulator.grouped_checks import refuse, refuse_unless
from mortise_npu_ascend.emulator.grouped_modes import GROUPED_FACTS, Mode
from mortise_npu_ascend.emulator.rejections import device_name

if TYPE_CHECKING:
    from mortise_npu_ascend.emulator.grouped_call import GroupedCall

_MOST_EXPERTS: Final = 256
_MOST_ROWS: Final = 16 * 1024 * 8
_INT8_COLUMNS_FROM: Final = 256


def check_finalize(call: GroupedCall, mode: Mode) -> None:
    """Refuse dtypes and sizes that the operator does not take.

    Raises:
        RuntimeError: with the reason.
    """
    assisted = GROUPED_FACTS[current_chip().generation].assist_bias
    if mode is not Mode.A8W8 and not (mode is Mode.A8W4 and assisted):
        x, weight = (device_name(tensors[0].dtype) for tensors in (call.x, call.weight))
        refuse(call, f"x1 dtype {x} and x2 dtype {weight} are not supported.")
    refuse_unless(
        call.group_list_type in (0, 1),
        call,
        f"groupListType should be 0 or 1, but is {call.group_list_type}",
    )
    refuse_unless(
        call.num_experts <= _MOST_EXPERTS and 1 <= call.num_rows <= _MOST_ROWS,
        call,
        f"e should be at most {_MOST_EXPERTS} and m in [1, {_MOST_ROWS}], got e[{call.num_experts}]"
        f" and m[{call.num_rows}].",
    )
    must_be_given(call, mode, "scale", "per_token_scale")
    check_row_scale(call, mode)
    if mode is Mode.A8W8:
        _check_int8(call, assisted=assisted)
    else:
        _check_int4_weight(call)


def _check_int8(call: GroupedCall, *, assisted: bool) -> None:
    must_be_none(call, Mode.A8W8, "bias", "offset")
    refuse_unless(call.is_tiled, call, "Only support x1: ND, x2: NZ")
    if assisted or first(call, "scale").dtype != torch.bfloat16:
        check_dtype(call, Mode.A8W8, "scale", torch.float32)
    check_columns(call, "scale")
    shape = weight_shape(call.weight[0])
    inner = 16 if assisted else 32
    least = _INT8_COLUMNS_FROM if assisted else 0
    refuse_unless(
        shape.inner % inner == 0 and shape.columns % 32 == 0 and shape.columns >= least,
        call,
        f"k dim {shape.inner} and n dim {shape.columns} do not support. only support k mod {inner} "
        f"equal 0, n mod 32 equal 0 and n bigger or equal {least}",
    )


def _check_int4_weight(call: GroupedCall) -> None:
    must_be_given(call, Mode.A8W4, "bias")
    check_bias(call, Mode.A8W4, (torch.float32,))
    check_dtype(call, Mode.A8W4, "scale", torch.int64)
    check_columns(call, "scale", groups=True)
    refuse_unless(
        first(call, "scale").ndim == 3 and num_groups(call, "scale") == 1,
        call,
        "Scale second dim should be 1",
    )
    if call.offset is not None:
        check_dtype(call, Mode.A8W4, "offset", torch.float32)
        check_columns(call, "offset", groups=True)
    shape = weight_shape(call.weight[0])
    refuse_unless(
        not shape.is_transposed
        and shape.inner % 64 == 0
        and shape.inner > 128
        and shape.columns % (64 if call.is_tiled else 8) == 0
        and shape.columns > 64,
        call,
        f"Weight k dim {shape.inner} and n dim {shape.columns} do not support. In W4A8 mode, only "
        "support k mod 64 equal 0, k should bigger than 128, n should bigger than 64.",
    )


def check_routing(
    call: GroupedCall, mode: Mode, logit: torch.Tensor, row_index: torch.Tensor, rows: int
) -> None:
    """Refuse logits and indices that do not belong to the rows, or lead out of the result.

    Raises:
        RuntimeError: with the reason.
    """
    refuse_unless(
        0 < rows <= call.num_rows,
        call,
        f"outputBS should be less than or equal to x MDim, but outputBS is {rows}, x MDim is "
        f"{call.num_rows}.",
    )
    for name, tensor in (("logit", logit), ("rowIndex", row_index)):
        refuse_unless(
            tuple(tensor.shape) == (call.num_rows,),
            call,
            f"{name} first dim should equal to x MDim {call.num_rows}, but actual is "
            f"{tuple(tensor.shape)}.",
        )
    indices = (torch.int64, torch.int32) if mode is Mode.A8W8 else (torch.int64,)
    refuse_unless(
        logit.dtype == torch.float32 and row_index.dtype in indices,
        call,
        f"the data types of [logit, rowIndex] are not supported, got [{device_name(logit.dtype)}, "
        f"{device_name(row_index.dtype)}].",
    )
    refuse_unless(
        bool(((row_index >= 0) & (row_index < rows)).all()),
        call,
        f"rowIndex must lie in 0..{rows - 1}; the device writes outside of its result",
    )


def check_shared(
    call: GroupedCall, shared_SN: torch.Tensor, offset: int, result_BN: torch.Tensor
) -> None:
    """Refuse rows of the shared expert that do not fit into the result.

    Raises:
        RuntimeError: with the reason.
    """
    rows, columns = result_BN.shape
    refuse_unless(
        shared_SN.dtype == torch.bfloat16 and shared_SN.ndim == 2,
        call,
        f"shareInput should be DT_BFLOAT16 of 2 dims, got {device_name(shared_SN.dtype)} of "
        f"{shared_SN.ndim}.",
    )
    refuse_unless(
        0 <= offset <= rows - len(shared_SN) and shared_SN.shape[1] == columns,
        call,
        "shareInputOffset add shareInputDim should be less than or equal to outputBS, and its last "
        f"dim equal to n, got offset {offset} and {tuple(shared_SN.shape)} for {rows} rows and "
        f"{columns} columns.",
    )
