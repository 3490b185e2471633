"""The overload of ``npu_grouped_matmul`` whose group list is a list of numbers."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Final

import torch

from mortise_npu_ascend.emulator.chip import current_chip
from mortise_npu_ascend.emulator.group_lists import GroupListKind
from mortise_npu_ascend.emulator.grouped_call import NO_GROUPS, ROWS, GroupedCall
from mortise_npu_ascend.emulator.grouped_checks import OPERATOR, check_arguments, refuse_unless
from mortise_npu_ascend.emulator.grouped_matmul import (
    given,
    grouped_product,
    refuse_given,
    result_dtype,
)
from mortise_npu_ascend.emulator.grouped_modes import GROUPED_FACTS
from mortise_npu_ascend.emulator.rejections import require

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


def npu_grouped_matmul_list(
    x: Sequence[torch.Tensor],
    weight: Sequence[torch.Tensor],
    *,
    bias: Sequence[torch.Tensor] | None = None,
    scale: Sequence[torch.Tensor] | None = None,
    offset: Sequence[torch.Tensor] | None = None,
    antiquant_scale: Sequence[torch.Tensor] | None = None,
    antiquant_offset: Sequence[torch.Tensor] | None = None,
    per_token_scale: Sequence[torch.Tensor] | None = None,
    group_list: Sequence[int] | None = None,
    activation_input: Sequence[torch.Tensor] | None = None,
    activation_quant_scale: Sequence[torch.Tensor] | None = None,
    activation_quant_offset: Sequence[torch.Tensor] | None = None,
    split_item: int | None = 0,
    group_type: int | None = None,
    group_list_type: int | None = 0,
    act_type: int | None = 0,
    output_dtype: torch.dtype | int | None = None,
) -> list[torch.Tensor]:
    """The overload with a list of numbers: cumulative ends that grow, and 2-D weights.

    Returns:
        One tensor for each weight with ``split_item`` 0 or 1, one in all with 2 or 3.

    Raises:
        RuntimeError: the chip does not take the arguments together.
    """
    check_arguments(x, weight, split_item, ROWS, group_list_type, act_type)
    refuse_given(
        group_type=group_type,
        perTokenScaleOptional=per_token_scale,
        activationInputOptional=activation_input,
        activationQuantScaleOptional=activation_quant_scale,
        activationQuantOffsetOptional=activation_quant_offset,
    )
    require(
        group_list_type == 0 and act_type == 0,
        OPERATOR,
        f"a group_list of numbers is cumulative and takes no activation, got [groupListType] "
        f"{group_list_type} and [actType] {act_type}.",
    )
    ends = list(group_list or ())
    require(
        group_list is None or (len(ends) > 1 and all(a <= b for a, b in pairwise([0, *ends]))),
        OPERATOR,
        "GroupListOptional should be non-negative and incremental, and its length not 1.",
    )
    separate = split_item in (0, 1)
    alone = separate and group_list is None
    call = GroupedCall(
        operator=OPERATOR,
        kernel="aclnnGroupedMatmul",
        x=tuple(x),
        weight=tuple(weight),
        bias=given(bias),
        scale=given(scale),
        offset=given(offset),
        antiquant_scale=given(antiquant_scale),
        antiquant_offset=given(antiquant_offset),
        per_token_scale=None,
        group_list=torch.tensor(ends) if ends else None,
        group_list_type=GroupListKind.CUMULATIVE,
        split_item=0 if alone else 2,
        group_type=NO_GROUPS if alone else ROWS,
        act_type=0,
        out_dtype=result_dtype(output_dtype, x[0].dtype),
    )
    _check_first_version(call)
    results = grouped_product(call)
    if alone or not separate:
        return results
    return list(
        results[0].split([b - a for a, b in pairwise([0, *ends])] + [call.num_rows - ends[-1]])
    )[:-1]


def _check_first_version(call: GroupedCall) -> None:
    """Refuse what the first version of the kernel, which the list of numbers goes to, lacks."""
    refuse_unless(
        call.scale is None or call.out_dtype == torch.int8,
        call,
        "a scale goes with y dtype DT_INT8 only where group_list is a list of numbers.",
    )
    refuse_unless(call.offset is None, call, "[offset] must be nullptr.")
    older = GROUPED_FACTS[current_chip().generation].assist_bias
    refuse_unless(
        not older or call.x[0].dtype != torch.float32,
        call,
        "the data type of [x or weight] is not supported, got [DT_FLOAT].",
    )


OPERATORS: Final[tuple[tuple[str, Callable[..., object]], ...]] = (
    ("npu_grouped_matmul.List", npu_grouped_matmul_list),
)
