"""``npu_grouped_matmul_swiglu_quant``: grouped product, SwiGLU and int8 rows in one operator."""

# M rows, K inner axis, N columns of which the left half is the gate, E experts, G groups of K.

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from mortise_npu_ascend.emulator.expert_products import expert_product
from mortise_npu_ascend.emulator.fused_swiglu_checks import check_fused
from mortise_npu_ascend.emulator.group_list_checks import checked_groups
from mortise_npu_ascend.emulator.group_lists import GroupListKind
from mortise_npu_ascend.emulator.grouped_call import (
    ROWS,
    GroupedCall,
    row_values,
    weight_shape,
)
from mortise_npu_ascend.emulator.grouped_checks import check_shapes, mode_of
from mortise_npu_ascend.emulator.grouped_matmul import operands_of
from mortise_npu_ascend.emulator.poison import unwritten
from mortise_npu_ascend.emulator.rejections import not_emulated, require
from mortise_npu_ascend.emulator.rounding import by_largest
from mortise_npu_ascend.emulator.swiglu import silu

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

FIRST: Final = "npu_grouped_matmul_swiglu_quant"
SECOND: Final = "npu_grouped_matmul_swiglu_quant_v2"

_INT8: Final = 1
_LARGEST_INT8: Final = 127


def npu_grouped_matmul_swiglu_quant(
    x: torch.Tensor,
    weight: torch.Tensor,
    group_list: torch.Tensor,
    weight_scale: torch.Tensor,
    x_scale: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    offset: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Multiply, activate the left half, and quantise each row by its largest magnitude.

    Args:
        x: int8 ``[M, K]``.
        weight: int8 ``[E, K, N]`` in ``FRACTAL_NZ``, or int4 words ``[E, K, N/8]``.
        group_list: int64 ``[E]``, cumulative.
        weight_scale: ``[E, N]``; of int4 weights words ``[E, N]`` or ``[E, G, N]``.
        x_scale: float32 ``[M]``.
        bias: None; of int4 weights float32 ``[E, N]``, 8 times the sum of weight times scale.
        offset: None.

    Returns:
        int8 ``[M, N/2]``, float32 scales ``[M]``, and a float32 that nothing writes. Rows after
        the last group are not written.

    Raises:
        RuntimeError: the chip does not take the arguments together.
    """
    require(offset is None, FIRST, "[offset] must be nullptr.")
    call = _call(FIRST, x, (weight,), (weight_scale,), x_scale, group_list, bias=bias)
    rows, scales = _fused(call, None)
    return rows, scales, unwritten((), torch.float32)


def npu_grouped_matmul_swiglu_quant_v2(
    x: torch.Tensor,
    weight: Sequence[torch.Tensor],
    weight_scale: Sequence[torch.Tensor],
    x_scale: torch.Tensor,
    group_list: torch.Tensor,
    *,
    smooth_scale: torch.Tensor | None = None,
    weight_assist_matrix: Sequence[torch.Tensor] | None = None,
    bias: torch.Tensor | None = None,
    dequant_mode: int | None = 0,
    dequant_dtype: int | None = 6,
    quant_mode: int | None = 0,
    quant_dtype: int | None = _INT8,
    group_list_type: int | None = 0,
    tuning_config: Sequence[int] | None = None,
    x_dtype: int | None = None,
    weight_dtype: int | None = None,
    weight_scale_dtype: int | None = None,
    x_scale_dtype: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same with lists of one tensor, counts, and int4 rows; the result is always int8.

    Args:
        x: int8 ``[M, K]``, or int4 words ``[M, K/8]``.
        weight: as of the first version.
        weight_scale: the same.
        x_scale: float32 ``[M]``.
        group_list: int64 ``[E]``.
        smooth_scale: float32 ``[E, N/2]`` or ``[E]``, only with int4 rows: multiplies what the
            activation gave.
        weight_assist_matrix: what the first version calls ``bias``.
        bias: None.
        dequant_mode: 0 for one scale for each column of a weight, 1 for one in each group of K.
        dequant_dtype: has no effect here.
        quant_mode: 0, a scale for each row.
        quant_dtype: int8.
        group_list_type: 0 cumulative, 1 counts.
        tuning_config: has no effect here.
        x_dtype: None, like the other three: they are of modes that are not emulated.
        weight_dtype: None.
        weight_scale_dtype: None.
        x_scale_dtype: None.

    Returns:
        int8 ``[M, N/2]`` and float32 scales ``[M]``; rows after the last group are not written.

    Raises:
        RuntimeError: the chip does not take the arguments together.
    """
    for name, tensors in (("weight", weight), ("weight_scale", weight_scale)):
        require(
            len(tensors) == 1,
            SECOND,
            f"The size of {name} should be 1, current size is {len(tensors)}.",
        )
    if {x_dtype, weight_dtype, weight_scale_dtype, x_scale_dtype} != {None}:
        not_emulated(SECOND, "a dtype that torch lacks")
    if (quant_mode, quant_dtype) != (0, _INT8):
        not_emulated(SECOND, f"quant_mode {quant_mode} with quant_dtype {quant_dtype}")
    require(bias is None, SECOND, "[bias] must be nullptr.")
    call = _call(
        SECOND,
        x,
        tuple(weight),
        tuple(weight_scale),
        x_scale,
        group_list,
        bias=weight_assist_matrix[0] if weight_assist_matrix else None,
        kind=group_list_type or 0,
    )
    return _fused(call, smooth_scale, dequant_mode=dequant_mode or 0)


def _call(
    operator: str,
    x: torch.Tensor,
    weight: tuple[torch.Tensor, ...],
    scale: tuple[torch.Tensor, ...],
    x_scale: torch.Tensor,
    group_list: torch.Tensor,
    *,
    bias: torch.Tensor | None,
    kind: int = GroupListKind.CUMULATIVE,
) -> GroupedCall:
    return GroupedCall(
        operator=operator,
        kernel="aclnnGroupedMatmulSwigluQuant" + ("V2" if operator == SECOND else ""),
        x=(x,),
        weight=weight,
        bias=None if bias is None else (bias,),
        scale=scale,
        offset=None,
        antiquant_scale=None,
        antiquant_offset=None,
        per_token_scale=(x_scale,),
        group_list=group_list,
        group_list_type=kind,
        split_item=2,
        group_type=ROWS,
        act_type=0,
        out_dtype=torch.float32,
    )


def _fused(
    call: GroupedCall, smooth_scale: torch.Tensor | None, *, dequant_mode: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    mode = mode_of(call)
    check_shapes(call)
    check_fused(call, mode, smooth_scale, dequant_mode)
    groups = checked_groups(call, size=call.num_rows, kind=call.group_list_type)
    columns = weight_shape(call.weight[0]).columns
    rows_MI = unwritten((call.num_rows, columns // 2), torch.int8)
    scales_M = unwritten((call.num_rows,), torch.float32)
    for group in groups:
        span = slice(group.start, group.end)
        values = row_values(call.x[0][span])
        product = expert_product(mode, values, operands_of(call, group.expert, span))
        gate, up = product.chunk(2, dim=1)
        activated = silu(gate) * up
        if smooth_scale is not None:
            activated = activated * smooth_scale[group.expert]
        rows_MI[span], scale = by_largest(activated, _LARGEST_INT8, divide=False)
        scales_M[span] = scale.squeeze(1)
    return rows_MI, scales_M


OPERATORS: Final[tuple[tuple[str, Callable[..., object]], ...]] = (
    (FIRST, npu_grouped_matmul_swiglu_quant),
    (SECOND, npu_grouped_matmul_swiglu_quant_v2),
)
