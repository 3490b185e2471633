"""What a grouped product refuses in its group list, and the groups that the list means."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Final

import torch

from mortise_npu_ascend.emulator.chip import current_chip
from mortise_npu_ascend.emulator.group_lists import Group, GroupListKind, groups_of
from mortise_npu_ascend.emulator.grouped_call import INNER_AXIS, ROWS
from mortise_npu_ascend.emulator.grouped_checks import refuse, refuse_unless

if TYPE_CHECKING:
    from mortise_npu_ascend.emulator.grouped_call import GroupedCall

_MOST_GROUPS: Final = 1024
_MOST_TENSORS: Final = 128


def checked_groups(call: GroupedCall, *, size: int, kind: int) -> tuple[Group, ...]:
    """The groups of ``size`` rows, or of the inner axis, after all checks of the list.

    Args:
        call: whose list.
        size: M, or K where the inner axis is grouped.
        kind: how the device reads the list, which is not always what the caller said.

    Raises:
        RuntimeError: the list is missing, or its dtype, shape or numbers are wrong.
    """
    listed = call.group_list
    if listed is None:
        refuse(call, "[groupListOptional] must not be nullptr.")
    refuse_unless(
        listed.dtype == torch.int64, call, "Invalid dtype: Only int64 is supported for groupList."
    )
    shape = (len(listed), 2) if kind == GroupListKind.PAIRS else (len(listed),)
    refuse_unless(
        tuple(listed.shape) == shape,
        call,
        f"the shape of [groupList] is not supported, got [dim num {listed.ndim}]. Constraint:[dim "
        f"num should be {len(shape)} when groupListType is {kind}].",
    )
    most = _MOST_GROUPS if call.is_stacked or call.group_type == INNER_AXIS else _MOST_TENSORS
    refuse_unless(
        len(listed) <= most,
        call,
        f"size of groupList {len(listed)} should be less than or equal to {most}.",
    )
    if call.group_type == ROWS:
        refuse_unless(
            len(listed) == call.num_experts,
            call,
            f"size of groupList(tensor) {len(listed)} should be equal to weight dim 0 "
            f"{call.num_experts} with groupType 0.",
        )
    return _groups_within(call, listed.tolist(), kind, size)


def check_single_group(call: GroupedCall, kind: int) -> None:
    """Warn of counts for a single expert in ``FRACTAL_NZ``: the manual rules them out.

    The device does not look, so only a strict chip refuses.
    """
    if not (call.is_tiled and kind != GroupListKind.CUMULATIVE and call.num_experts == 1):
        return
    reason = (
        "a group_list of counts must not have length 1 when the weight format is FRACTAL_NZ; give "
        "a single expert a cumulative one (group_list_type 0)"
    )
    if current_chip().strict:
        refuse(call, reason)
    warnings.warn(f"{call.operator}: {reason}", RuntimeWarning, stacklevel=2)


def _groups_within(call: GroupedCall, values: list[int], kind: int, size: int) -> tuple[Group, ...]:
    try:
        groups = groups_of(values, kind)
    except ValueError as error:
        refuse(call, str(error))
    end = groups[-1].end if groups else 0
    refuse_unless(
        end <= size, call, f"the last value of group list({end}) must not exceed x shape ({size})."
    )
    return groups
