"""What every mode of a grouped product asks of its scales, biases, results and lists."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mortise_npu_ascend.emulator.fixpipe import WORD_DTYPES
from mortise_npu_ascend.emulator.grouped_call import GroupedCall, weight_shape
from mortise_npu_ascend.emulator.grouped_checks import refuse_unless
from mortise_npu_ascend.emulator.rejections import device_name

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from mortise_npu_ascend.emulator.grouped_modes import Mode


def must_be_none(call: GroupedCall, mode: Mode, *names: str) -> None:
    """Refuse arguments that a mode has no place for."""
    for name in names:
        refuse_unless(getattr(call, name) is None, call, f"when {mode}, [{name}] must be nullptr.")


def must_be_given(call: GroupedCall, mode: Mode, *names: str) -> None:
    """Refuse to go on without arguments."""
    for name in names:
        refuse_unless(
            getattr(call, name) is not None, call, f"when {mode}, [{name}] must not be nullptr."
        )


def must_be_single(call: GroupedCall, mode: Mode) -> None:
    """Refuse more than one row tensor, and weights that are not stacked."""
    refuse_unless(
        len(call.x) == 1 and call.is_stacked,
        call,
        f"when {mode} with separated x, weight or y, [tensor list] is not supported, got [x size "
        f"{len(call.x)}, weight size {len(call.weight)}].",
    )


def check_result(call: GroupedCall, mode: Mode, accepted: Collection[torch.dtype]) -> None:
    """Refuse dtypes of the result."""
    refuse_unless(
        call.out_dtype in accepted,
        call,
        f"when {mode}, the data type of [y] is not supported, got [{device_name(call.out_dtype)}]. "
        f"Constraint:[y dtype should be {_names(accepted)}].",
    )


def check_bias(call: GroupedCall, mode: Mode, accepted: Collection[torch.dtype]) -> None:
    """Refuse dtypes and shapes of a bias, if there is one."""
    if call.bias is None:
        return
    found = call.bias[0].dtype
    refuse_unless(
        found in accepted,
        call,
        f"when {mode}, the data type of [bias] is not supported, got [{device_name(found)}]. "
        f"Constraint:[bias dtype should be {_names(accepted)}].",
    )
    check_columns(call, "bias")


def check_dtype(call: GroupedCall, mode: Mode, name: str, accepted: torch.dtype) -> None:
    """Refuse any other dtype of an argument."""
    found = first(call, name).dtype
    refuse_unless(
        found == accepted,
        call,
        f"when {mode}, the data type of [{name}] is not supported, got [{device_name(found)}]. "
        f"Constraint:[{name} dtype should be {device_name(accepted)}].",
    )


def check_words(call: GroupedCall, mode: Mode) -> None:
    """Refuse scales that are not 64-bit words."""
    found = first(call, "scale").dtype
    refuse_unless(
        found in WORD_DTYPES,
        call,
        f"when {mode}, the data type of [scale] is not supported, got [{device_name(found)}]. "
        "Constraint:[scale dtype should be DT_UINT64, which torch_npu takes as int64].",
    )


def check_columns(call: GroupedCall, name: str, *, groups: bool = False) -> None:
    """Refuse an argument unless each expert's part is ``[N]``, or ``[G, N]`` with ``groups``."""
    tensors = getattr(call, name)
    refuse_unless(
        len(tensors) == len(call.weight),
        call,
        f"{name} size[{len(tensors)}] must be equal with weight size[{len(call.weight)}].",
    )
    columns = weight_shape(call.weight[0]).columns
    leading = int(call.is_stacked)
    for tensor in tensors:
        dims = tensor.ndim - leading
        refuse_unless(
            dims == 1 or (groups and dims == 2),
            call,
            f"{name} Dim must be {1 + leading}{f' or {2 + leading}' if groups else ''}, but now is "
            f"{tensor.ndim}.",
        )
        refuse_unless(
            tensor.shape[-1] == columns,
            call,
            f"NDim[{tensor.shape[-1]}] of {name} should be equal with NDim[{columns}] of weight.",
        )
        refuse_unless(
            not call.is_stacked or len(tensor) == call.num_experts,
            call,
            f"{name} batch size[{len(tensor)}] should be equal with groupList "
            f"length[{call.num_experts}].",
        )


def check_group_size(call: GroupedCall, name: str, fits: Callable[[int], bool], rule: str) -> None:
    """Refuse groups of the inner axis that do not divide it, or that a mode does not take."""
    inner = weight_shape(call.weight[0]).inner
    groups = num_groups(call, name)
    refuse_unless(
        groups > 0 and inner % groups == 0 and fits(inner // groups),
        call,
        f"the tensor shapes of [x, {name}...] are mismatched, the reason is: [{name} shape is "
        f"[e, G, n], {rule}, but k is {inner} and G is {groups}].",
    )


def check_row_scale(call: GroupedCall, mode: Mode, *, column: bool = False) -> None:
    """Refuse scales of rows unless they are float32 ``[M]``, or ``[M, 1]`` with ``column``."""
    if call.per_token_scale is None:
        return
    scale = call.per_token_scale[0]
    refuse_unless(
        len(call.per_token_scale) == len(call.x) == 1,
        call,
        f"PerTokenScaleOptional size[{len(call.per_token_scale)}] must be 1 and equal with x "
        f"size[{len(call.x)}].",
    )
    one = "must be 1 when x is single tensor"
    refuse_unless(
        scale.ndim == (2 if column else 1),
        call,
        f"PerTokenScaleOptional dim num {'should be 2 of shape (m, 1)' if column else one}, but "
        f"now is {scale.ndim}.",
    )
    refuse_unless(
        len(scale) == call.num_rows,
        call,
        f"MDim[{len(scale)}] of perTokenScaleOptional should be equal with MDim[{call.num_rows}] "
        "of x.",
    )
    check_dtype(call, mode, "per_token_scale", torch.float32)


def num_groups(call: GroupedCall, name: str) -> int:
    """G of scales ``[(E,) G, N]``; 1 where there are no groups."""
    tensor = first(call, name)
    return tensor.shape[-2] if tensor.ndim == 2 + int(call.is_stacked) else 1


def first(call: GroupedCall, name: str) -> torch.Tensor:
    """The first tensor of an argument that is there."""
    tensor: torch.Tensor = getattr(call, name)[0]
    return tensor


def _names(dtypes: Collection[torch.dtype]) -> str:
    return " or ".join(sorted(device_name(dtype) for dtype in dtypes))
