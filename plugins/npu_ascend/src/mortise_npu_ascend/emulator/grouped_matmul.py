"""``npu_grouped_matmul``: the product of each expert's rows with that expert's weight."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Final

import torch

from mortise_npu_ascend.emulator.chip import current_chip
from mortise_npu_ascend.emulator.expert_products import (
    ExpertOperands,
    expert_product,
    int4_halves,
)
from mortise_npu_ascend.emulator.group_list_checks import check_single_group, checked_groups
from mortise_npu_ascend.emulator.group_lists import Group, GroupListKind
from mortise_npu_ascend.emulator.grouped_call import (
    INNER_AXIS,
    NO_GROUPS,
    GroupedCall,
    row_values,
    weight_shape,
    weight_values,
)
from mortise_npu_ascend.emulator.grouped_checks import (
    OPERATOR,
    check_arguments,
    check_shapes,
    check_split,
    mode_of,
    refuse_unless,
)
from mortise_npu_ascend.emulator.grouped_dtypes import check_mode, reads_counts_only
from mortise_npu_ascend.emulator.numbers import dtype_of
from mortise_npu_ascend.emulator.poison import unwritten
from mortise_npu_ascend.emulator.rejections import not_emulated, reject, require
from mortise_npu_ascend.emulator.storage import Format, storage_format

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mortise_npu_ascend.emulator.grouped_modes import Mode

_RESULTS: Final = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.int32, torch.int8})


def npu_grouped_matmul(
    x: Sequence[torch.Tensor],
    weight: Sequence[torch.Tensor],
    *,
    bias: Sequence[torch.Tensor] | None = None,
    scale: Sequence[torch.Tensor] | None = None,
    offset: Sequence[torch.Tensor] | None = None,
    antiquant_scale: Sequence[torch.Tensor] | None = None,
    antiquant_offset: Sequence[torch.Tensor] | None = None,
    per_token_scale: Sequence[torch.Tensor] | None = None,
    group_list: torch.Tensor | None = None,
    activation_input: Sequence[torch.Tensor] | None = None,
    activation_quant_scale: Sequence[torch.Tensor] | None = None,
    activation_quant_offset: Sequence[torch.Tensor] | None = None,
    split_item: int | None = 0,
    group_type: int | None = None,
    group_list_type: int | None = 0,
    act_type: int | None = 0,
    tuning_config: Sequence[int] | None = None,
    output_dtype: int | None = None,
    x_dtype: int | None = None,
    weight_dtype: int | None = None,
    scale_dtype: int | None = None,
    per_token_scale_dtype: int | None = None,
) -> list[torch.Tensor]:
    """Multiply the rows of each expert with its weight; see :class:`GroupedCall` for shapes.

    Without ``output_dtype`` the result has the dtype of the rows, int8 for int8 rows. Rows after
    the last group are not written.

    Returns:
        One tensor ``[M, N]``; one for each weight with ``group_type`` -1; ``[E, M, N]`` with 2.

    Raises:
        RuntimeError: the chip does not take the arguments together.
    """
    check_arguments(x, weight, split_item, group_type, group_list_type, act_type)
    refuse_given(
        activationInputOptional=activation_input,
        activationQuantScaleOptional=activation_quant_scale,
        activationQuantOffsetOptional=activation_quant_offset,
    )
    for name, asked in (
        ("x_dtype", x_dtype),
        ("weight_dtype", weight_dtype),
        ("scale_dtype", scale_dtype),
        ("per_token_scale_dtype", per_token_scale_dtype),
    ):
        if asked is not None:
            not_emulated(OPERATOR, f"{name} {asked}")
    assert group_type is not None
    tiled = storage_format(weight[0]) is Format.FRACTAL_NZ
    call = GroupedCall(
        operator=OPERATOR,
        kernel="aclnnGroupedMatmulWeightNz" if tiled else "aclnnGroupedMatmulV5",
        x=tuple(x),
        weight=tuple(weight),
        bias=given(bias),
        scale=given(scale),
        offset=given(offset),
        antiquant_scale=given(antiquant_scale),
        antiquant_offset=given(antiquant_offset),
        per_token_scale=given(per_token_scale),
        group_list=group_list,
        group_list_type=group_list_type or 0,
        split_item=split_item or 0,
        group_type=group_type,
        act_type=act_type or 0,
        out_dtype=result_dtype(output_dtype, x[0].dtype),
    )
    return grouped_product(call)


def grouped_product(call: GroupedCall) -> list[torch.Tensor]:
    """Check one call, then compute it."""
    mode = mode_of(call)
    check_split(call)
    check_shapes(call)
    check_mode(call, mode)
    if call.group_type == NO_GROUPS:
        return [_whole_product(call, mode, expert) for expert in range(call.num_experts)]
    if call.group_type == INNER_AXIS:
        return [_inner_products(call)]
    return [_row_products(call, mode)]


def _row_products(call: GroupedCall, mode: Mode) -> torch.Tensor:
    """One result for the rows of all experts."""
    groups = _row_groups(call, mode)
    columns = weight_shape(call.weight[0]).columns
    results_MN = unwritten((call.num_rows, columns), call.out_dtype)
    rows = call.x[0] if len(call.x) == 1 else torch.cat(call.x)
    for group in groups:
        span = slice(group.start, group.end)
        operands = operands_of(call, group.expert, span)
        results_MN[span] = expert_product(mode, row_values(rows[span]), operands)
    if reads_counts_only(mode) and current_chip().strict:
        _overwrite_rows(call.x[0], groups)
    return results_MN


def _row_groups(call: GroupedCall, mode: Mode) -> tuple[Group, ...]:
    kind = GroupListKind.COUNTS if reads_counts_only(mode) else call.group_list_type
    if call.group_list is None and len(call.x) > 1:
        ends = torch.tensor([len(rows) for rows in call.x]).cumsum(0).tolist()
        return tuple(Group(e, *span) for e, span in enumerate(pairwise([0, *ends])))
    check_single_group(call, kind)
    groups = checked_groups(call, size=call.num_rows, kind=kind)
    if len(call.x) > 1:
        counts = {group.expert: group.end - group.start for group in groups}
        refuse_unless(
            [counts.get(expert, 0) for expert in range(len(call.x))] == [len(r) for r in call.x],
            call,
            "X dim 0 value should be equal to the difference of groupListOptional.",
        )
    return groups


def _whole_product(call: GroupedCall, mode: Mode, expert: int) -> torch.Tensor:
    """The result of one weight and its own rows."""
    operands = operands_of(call, expert, slice(None))
    return expert_product(mode, row_values(call.x[expert]), operands)


def _inner_products(call: GroupedCall) -> torch.Tensor:
    """One result for each group of the inner axis, of zeros where a group is empty."""
    rows_MK, weight_KN = call.x[0], call.weight[0]
    groups = checked_groups(call, size=rows_MK.shape[1], kind=call.group_list_type)
    assert call.group_list is not None
    shape = (len(call.group_list), len(rows_MK), weight_KN.shape[1])
    results = torch.zeros(shape, dtype=call.out_dtype)
    for group in groups:
        span = slice(group.start, group.end)
        part = rows_MK[:, span].float() @ weight_KN[span].float()
        results[group.expert] = part.to(call.out_dtype)
    return results


def operands_of(call: GroupedCall, expert: int, rows: slice) -> ExpertOperands:
    """What the ``rows`` of one expert are multiplied with."""
    weight = call.of_expert(call.weight, expert)
    assert weight is not None
    row_scale = None
    if call.per_token_scale is not None:
        row_scale = call.per_token_scale[0][rows].reshape(-1, 1)
    return ExpertOperands(
        weight=weight_values(weight),
        bias=call.of_expert(call.bias, expert),
        scale=call.of_expert(call.scale, expert),
        offset=call.of_expert(call.offset, expert),
        antiquant_scale=call.of_expert(call.antiquant_scale, expert),
        antiquant_offset=call.of_expert(call.antiquant_offset, expert),
        row_scale=row_scale,
        act_type=call.act_type,
        out_dtype=call.out_dtype,
    )


def _overwrite_rows(rows_MK: torch.Tensor, groups: Sequence[Group]) -> None:
    """Leave in int8 rows what the kernel does: the int4 halves of each, upper first."""
    end = groups[-1].end if groups else 0
    halves = torch.cat(int4_halves(rows_MK[:end]), dim=1)
    low, high = halves[:, 0::2], halves[:, 1::2]
    rows_MK[:end] = (high << 4) | (low & 0xF)


def result_dtype(asked: torch.dtype | int | None, default: torch.dtype) -> torch.dtype:
    """The dtype asked for, that of the rows without one.

    Raises:
        RuntimeError: no results have it.
    """
    found = asked if isinstance(asked, torch.dtype) else dtype_of(asked)
    if asked is None:
        return default
    if found not in _RESULTS:
        reject(OPERATOR, f"The output dtype {asked} is not supported for now.")
    return found


def given(tensors: Sequence[torch.Tensor] | None) -> tuple[torch.Tensor, ...] | None:
    """None for an empty list too: the vendor's library makes no difference."""
    return tuple(tensors) if tensors else None


def refuse_given(**arguments: object) -> None:
    """Refuse arguments that are reserved.

    Raises:
        RuntimeError: one is there.
    """
    for name, value in arguments.items():
        require(value is None, OPERATOR, f"{name} must be nullptr.")


OPERATORS: Final[tuple[tuple[str, Callable[..., object]], ...]] = (
    ("npu_grouped_matmul", npu_grouped_matmul),
)
