"""The split of gated delta net projections, by one Triton program."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from mortise.plugin import QKVParts
from mortise.reference import qkv as reference
from mortise_cuda_common.kernels.qkv_kernel import split_kernel
from mortise_cuda_common.kernels.qkv_plan import NUM_WARPS, split_plan

if TYPE_CHECKING:
    from mortise.plugin import QKVShape
    from mortise_cuda_common.runtime import Runtime

DTYPES: Final = frozenset({torch.bfloat16, torch.float16, torch.float32})


def split(
    runtime: Runtime, projected_qkvz: torch.Tensor, projected_ba: torch.Tensor, shape: QKVShape
) -> QKVParts:
    """Cut the projections along their layout.

    Args:
        runtime: of the backend.
        projected_qkvz: ``[T, 2 * nk * hk + 2 * nv * hv]`` of any row stride.
        projected_ba: ``[T, 2 * nv]`` of any row stride.
        shape: heads, head sizes and the layout.

    Returns:
        Copies of all parts. Other dtypes than bfloat16, float16 and float32 are left to the exact
        reference, which cuts them by torch's operators.
    """
    if not {projected_qkvz.dtype, projected_ba.dtype} <= DTYPES:
        return reference.qkv_split(projected_qkvz, projected_ba, shape)
    qkvz, ba = _with_dense_columns(projected_qkvz), _with_dense_columns(projected_ba)
    num_tokens = qkvz.shape[0]
    values = shape.num_value_heads * shape.value_head_dim
    parts = QKVParts(
        mixed_qkv=qkvz.new_empty(num_tokens, qkvz.shape[1] - values),
        z=qkvz.new_empty(num_tokens, shape.num_value_heads, shape.value_head_dim),
        b=ba.new_empty(num_tokens, shape.num_value_heads),
        a=ba.new_empty(num_tokens, shape.num_value_heads),
    )
    plan = split_plan(shape, qkvz.element_size())
    tensors = (qkvz, ba, parts.mixed_qkv, parts.z, parts.b, parts.a)
    runtime.programs.launch(
        split_kernel,
        plan.programs(num_tokens),
        [*tensors, num_tokens, qkvz.stride(0), ba.stride(0)],
        plan.constants,
        num_warps=NUM_WARPS,
    )
    return parts


def _with_dense_columns(projected: torch.Tensor) -> torch.Tensor:
    """Rows may be apart, and in any order; columns may not be apart."""
    return projected if projected.stride(1) == 1 else projected.contiguous()
