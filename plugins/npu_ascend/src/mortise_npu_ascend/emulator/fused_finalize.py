"""``npu_grouped_matmul_finalize_routing``: a grouped product, and the sum of each token's rows."""

# M rows, K inner axis, N columns, E experts, B rows of the result, S rows of the shared expert.

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from mortise_npu_ascend.emulator.expert_products import expert_product
from mortise_npu_ascend.emulator.fused_finalize_checks import (
    check_finalize,
    check_routing,
    check_shared,
)
from mortise_npu_ascend.emulator.group_list_checks import checked_groups
from mortise_npu_ascend.emulator.grouped_call import (
    ROWS,
    GroupedCall,
    row_values,
    weight_shape,
)
from mortise_npu_ascend.emulator.grouped_checks import check_shapes, mode_of
from mortise_npu_ascend.emulator.grouped_matmul import operands_of
from mortise_npu_ascend.emulator.numbers import dtype_of
from mortise_npu_ascend.emulator.rejections import not_emulated, require

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

OPERATOR: Final = "npu_grouped_matmul_finalize_routing"


def npu_grouped_matmul_finalize_routing(
    x: torch.Tensor,
    w: torch.Tensor,
    group_list: torch.Tensor,
    *,
    scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    offset: torch.Tensor | None = None,
    pertoken_scale: torch.Tensor | None = None,
    shared_input: torch.Tensor | None = None,
    logit: torch.Tensor | None = None,
    row_index: torch.Tensor | None = None,
    dtype: torch.dtype | int | None = None,
    shared_input_weight: float | None = 1.0,
    shared_input_offset: int | None = 0,
    output_bs: int | None = 0,
    group_list_type: int | None = 1,
    tuning_config: Sequence[int] | None = None,
    x_dtype: int | None = None,
    w_dtype: int | None = None,
    scale_dtype: int | None = None,
    pertoken_scale_dtype: int | None = None,
) -> torch.Tensor:
    """Multiply, weight each row by its logit, and add it to the row of the result it belongs to.

    ``y[row_index[m]] += logit[m] * row m``, from zeros; rows ``shared_input_offset`` and following
    also get ``shared_input_weight * shared_input``. The device adds in any order; this does so by
    rows.

    Args:
        x: int8 ``[M, K]``.
        w: int8 ``[E, K, N]`` in ``FRACTAL_NZ``, or int4 words ``[E, K, N/8]``.
        group_list: int64 ``[E]``.
        scale: float32 ``[E, N]``, on A5 also bf16; of int4 weights words ``[E, 1, N]``.
        bias: None; of int4 weights float32 ``[E, N]``, 8 times the sum of weight times scale.
        offset: None; of asymmetric int4 weights float32 ``[E, 1, N]``, times the scale.
        pertoken_scale: float32 ``[M]``.
        shared_input: bf16 ``[S, N]``.
        logit: float32 ``[M]``.
        row_index: int64 ``[M]``, with int8 weights also int32.
        dtype: float32.
        shared_input_weight: see above.
        shared_input_offset: see above.
        output_bs: B; 0 is M.
        group_list_type: 0 cumulative, 1 counts.
        tuning_config: has no effect here.
        x_dtype: None, like the other three: they are of modes that are not emulated.
        w_dtype: None.
        scale_dtype: None.
        pertoken_scale_dtype: None.

    Returns:
        float32 ``[B, N]``.

    Raises:
        RuntimeError: the chip does not take the arguments together.
    """
    if {x_dtype, w_dtype, scale_dtype, pertoken_scale_dtype} != {None}:
        not_emulated(OPERATOR, "a dtype that torch lacks")
    asked = dtype if isinstance(dtype, torch.dtype) or dtype is None else dtype_of(dtype)
    require(
        asked in (None, torch.float32), OPERATOR, f"Not supportted output dtype is {asked or dtype}"
    )
    require(x.ndim == 2 and w.ndim == 3, OPERATOR, "x_dim should be 2 and w_dim should be 3.")
    kind = 1 if group_list_type is None else group_list_type
    call = _call(x, w, scale, bias, offset, pertoken_scale, group_list, kind)
    mode = mode_of(call)
    check_shapes(call)
    check_finalize(call, mode)
    if logit is None or row_index is None:
        not_emulated(OPERATOR, "a call without logit and row_index")
    result_BN = torch.zeros(output_bs or call.num_rows, weight_shape(w).columns)
    check_routing(call, mode, logit, row_index, len(result_BN))
    groups = checked_groups(call, size=call.num_rows, kind=call.group_list_type)
    if shared_input is not None:
        first_row = shared_input_offset or 0
        check_shared(call, shared_input, first_row, result_BN)
        factor = 1.0 if shared_input_weight is None else shared_input_weight
        result_BN[first_row : first_row + len(shared_input)] += factor * shared_input.float()
    for group in groups:
        span = slice(group.start, group.end)
        product = expert_product(mode, row_values(x[span]), operands_of(call, group.expert, span))
        result_BN.index_add_(0, row_index[span], product * logit[span, None])
    return result_BN


def _call(
    x: torch.Tensor,
    w: torch.Tensor,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    offset: torch.Tensor | None,
    pertoken_scale: torch.Tensor | None,
    group_list: torch.Tensor,
    kind: int,
) -> GroupedCall:
    return GroupedCall(
        operator=OPERATOR,
        kernel="aclnnGroupedMatmulFinalizeRouting",
        x=(x,),
        weight=(w,),
        bias=_listed(bias),
        scale=_listed(scale),
        offset=_listed(offset),
        antiquant_scale=None,
        antiquant_offset=None,
        per_token_scale=_listed(pertoken_scale),
        group_list=group_list,
        group_list_type=kind,
        split_item=2,
        group_type=ROWS,
        act_type=0,
        out_dtype=torch.float32,
    )


def _listed(tensor: torch.Tensor | None) -> tuple[torch.Tensor, ...] | None:
    return None if tensor is None else (tensor,)


OPERATORS: Final[tuple[tuple[str, Callable[..., object]], ...]] = (
    (OPERATOR, npu_grouped_matmul_finalize_routing),
)
