"""Products of grouped rows with the NVFP4 weights of their experts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from mortise_cuda_blackwell.kernels import nvfp4_gate_up_kernel as gate_up
from mortise_cuda_blackwell.kernels import nvfp4_grouped_kernel as grouped
from mortise_cuda_blackwell.kernels import nvfp4_weight_only_kernel as weight_only
from mortise_cuda_blackwell.kernels.cases import (
    BF16_INSTRUCTION,
    BLACKWELL,
    COUNTS,
    FP4_INSTRUCTION,
)
from mortise_cuda_blackwell.kernels.nvfp4_rows import power_of_two
from mortise_cuda_common.programs.base import CompileCase
from mortise_cuda_common.rows import Kind, Rows

if TYPE_CHECKING:
    from mortise_cuda_blackwell.layout import Nvfp4Weight
    from mortise_cuda_common.groups import Groups
    from mortise_cuda_common.programs.base import Programs

TILE: Final = 128
"""Rows of a weight, of one part, that one program multiplies."""

BLOCK_ROWS: Final = 128
"""Rows that the fp4 instruction takes."""
BLOCK_COLUMNS: Final = 256
GATE_UP_WARPS: Final = 8
"""Of gate and up in one program: with four it spills registers (ptxas of CUDA 12.9)."""

PLAIN_BLOCK_ROWS: Final = 64
PLAIN_BLOCK_COLUMNS: Final = 128


def nvfp4_product(
    programs: Programs,
    rows: Rows,
    weight: Nvfp4Weight,
    alphas_ES: torch.Tensor,
    groups: Groups,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Multiply quantised rows by the weight of their expert.

    Args:
        programs: runs it.
        rows: NVFP4.
        weight: the experts.
        alphas_ES: float32 ``[E, S]``, the factor of each part's sums; where the rows state a
            global scale, that is multiplied to it.
        groups: the rows of each expert.
        out_dtype: bfloat16 or float32.

    Returns:
        ``[R, N]``; rows of no group are undefined.
    """
    output = rows.values.new_empty((groups.num_rows, weight.rows), dtype=out_dtype)
    programs.launch(
        grouped.product_kernel,
        groups.most_tiles(BLOCK_ROWS) * weight.num_parts * -(-weight.part_rows // TILE),
        (
            rows.values,
            rows.scales,
            weight.values,
            weight.scales,
            alphas_ES,
            1.0 if rows.global_scale is None else rows.global_scale,
            output,
            groups.first_rows,
            groups.counts,
        ),
        product_constants(
            part_rows=weight.part_rows,
            num_parts=weight.num_parts,
            columns=weight.columns,
            out_dtype=out_dtype,
            num_groups=groups.num_groups,
        ),
    )
    return output


def nvfp4_gate_up(
    programs: Programs,
    rows: Rows,
    weight: Nvfp4Weight,
    alphas_E2: torch.Tensor,
    next_global_scales_E: torch.Tensor,
    groups: Groups,
) -> Rows:
    """Multiply by gate and up, apply SwiGLU in bfloat16, and quantise for the next product.

    Args:
        programs: runs it.
        rows: NVFP4.
        weight: gate over up ``[E, 2I, H]``, I a multiple of 16.
        alphas_E2: float32 ``[E, 2]``, the factors of the sums of gate and of up; where the rows
            state a global scale, that is multiplied to it.
        next_global_scales_E: float32 ``[E]``, under which the result is quantised.
        groups: the rows of each expert.

    Returns:
        NVFP4 rows ``[R, I]`` without a common global scale.
    """
    assert weight.num_parts == 2 and weight.part_rows % 16 == 0
    values = rows.values.new_empty((groups.num_rows, weight.part_rows // 2))
    scales = rows.values.new_empty(
        (groups.num_rows, weight.part_rows // 16), dtype=torch.float8_e4m3fn
    )
    programs.launch(
        gate_up.gate_up_kernel,
        groups.most_tiles(BLOCK_ROWS) * -(-weight.part_rows // TILE),
        (
            rows.values,
            rows.scales,
            weight.values,
            weight.scales,
            alphas_E2,
            1.0 if rows.global_scale is None else rows.global_scale,
            next_global_scales_E.reciprocal(),
            values,
            scales,
            groups.first_rows,
            groups.counts,
        ),
        gate_up_constants(
            part_rows=weight.part_rows, columns=weight.columns, num_groups=groups.num_groups
        ),
        num_warps=GATE_UP_WARPS,
    )
    return Rows(values=values, kind=Kind.NVFP4, scales=scales)


def weight_only_product(
    programs: Programs,
    plain_RK: torch.Tensor,
    weight: Nvfp4Weight,
    groups: Groups,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Multiply bfloat16 rows by float4 weights, which become bfloat16 without loss on the way.

    Args:
        programs: runs it.
        plain_RK: bfloat16 ``[R, K]``; columns are adjacent.
        weight: the experts.
        groups: the rows of each expert.
        out_dtype: bfloat16 or float32.

    Returns:
        ``[R, N]``; rows of no group are undefined.
    """
    assert plain_RK.dtype is torch.bfloat16 and plain_RK.stride(1) == 1
    output = plain_RK.new_empty((groups.num_rows, weight.rows), dtype=out_dtype)
    programs.launch(
        weight_only.product_kernel,
        groups.most_tiles(PLAIN_BLOCK_ROWS) * weight.num_parts * -(-weight.part_rows // TILE),
        (
            plain_RK,
            weight.values,
            weight.scales,
            weight.global_scale,
            output,
            groups.first_rows,
            groups.counts,
        ),
        weight_only_constants(
            row_stride=plain_RK.stride(0),
            part_rows=weight.part_rows,
            num_parts=weight.num_parts,
            columns=weight.columns,
            out_dtype=out_dtype,
            num_groups=groups.num_groups,
        ),
    )
    return output


def product_constants(
    *, part_rows: int, num_parts: int, columns: int, out_dtype: torch.dtype, num_groups: int
) -> dict[str, int | float | bool]:
    """The constants of a launch of :func:`nvfp4_product`."""
    return {
        "PART_ROWS": part_rows,
        "NUM_PARTS": num_parts,
        "COLUMNS": columns,
        "OUTPUT_BF16": out_dtype is torch.bfloat16,
        "NUM_GROUPS": num_groups,
        "GROUP_BLOCK": power_of_two(num_groups),
        "BLOCK_ROWS": BLOCK_ROWS,
        "BLOCK_COLUMNS": BLOCK_COLUMNS,
    }


def gate_up_constants(
    *, part_rows: int, columns: int, num_groups: int
) -> dict[str, int | float | bool]:
    """The constants of a launch of :func:`nvfp4_gate_up`."""
    return {
        "PART_ROWS": part_rows,
        "COLUMNS": columns,
        "NUM_GROUPS": num_groups,
        "GROUP_BLOCK": power_of_two(num_groups),
        "BLOCK_ROWS": BLOCK_ROWS,
        "BLOCK_COLUMNS": BLOCK_COLUMNS,
    }


def weight_only_constants(
    *,
    row_stride: int,
    part_rows: int,
    num_parts: int,
    columns: int,
    out_dtype: torch.dtype,
    num_groups: int,
) -> dict[str, int | float | bool]:
    """The constants of a launch of :func:`weight_only_product`."""
    return {
        **product_constants(
            part_rows=part_rows,
            num_parts=num_parts,
            columns=columns,
            out_dtype=out_dtype,
            num_groups=num_groups,
        ),
        "ROW_STRIDE": row_stride,
        "BLOCK_ROWS": PLAIN_BLOCK_ROWS,
        "BLOCK_COLUMNS": PLAIN_BLOCK_COLUMNS,
    }


def _product_case(
    name: str, *, part_rows: int, num_parts: int, columns: int, out_dtype: torch.dtype
) -> CompileCase:
    output = "*bf16" if out_dtype is torch.bfloat16 else "*fp32"
    return CompileCase(
        name=name,
        source=grouped.product_kernel,
        signature={
            "rows": "*u8",
            "row_scales": "*fp8e4nv",
            "weight": "*u8",
            "weight_scales": "*fp8e4nv",
            "alphas": "*fp32",
            "row_alpha": "fp32",
            "output": output,
            **COUNTS,
        },
        constants=product_constants(
            part_rows=part_rows,
            num_parts=num_parts,
            columns=columns,
            out_dtype=out_dtype,
            num_groups=32,
        ),
        architectures=BLACKWELL,
        instructions=FP4_INSTRUCTION,
    )


def _gate_up_case(name: str, *, part_rows: int, columns: int) -> CompileCase:
    return CompileCase(
        name=name,
        source=gate_up.gate_up_kernel,
        signature={
            "rows": "*u8",
            "row_scales": "*fp8e4nv",
            "weight": "*u8",
            "weight_scales": "*fp8e4nv",
            "alphas": "*fp32",
            "row_alpha": "fp32",
            "divisors": "*fp32",
            "values": "*u8",
            "scales": "*fp8e4nv",
            **COUNTS,
        },
        constants=gate_up_constants(part_rows=part_rows, columns=columns, num_groups=32),
        architectures=BLACKWELL,
        num_warps=GATE_UP_WARPS,
        instructions=FP4_INSTRUCTION,
    )


def _weight_only_case(
    name: str, *, part_rows: int, num_parts: int, columns: int, out_dtype: torch.dtype
) -> CompileCase:
    output = "*bf16" if out_dtype is torch.bfloat16 else "*fp32"
    return CompileCase(
        name=name,
        source=weight_only.product_kernel,
        signature={
            "rows": "*bf16",
            "weight": "*u8",
            "weight_scales": "*fp8e4nv",
            "alphas": "*fp32",
            "output": output,
            **COUNTS,
        },
        constants=weight_only_constants(
            row_stride=columns,
            part_rows=part_rows,
            num_parts=num_parts,
            columns=columns,
            out_dtype=out_dtype,
            num_groups=32,
        ),
        architectures=BLACKWELL,
        instructions=BF16_INSTRUCTION,
    )


_BF16, _FP32 = torch.bfloat16, torch.float32

CASES: Final = (
    _product_case("nvfp4 w13", part_rows=2048, num_parts=2, columns=7168, out_dtype=_BF16),
    _product_case("nvfp4 w2", part_rows=7168, num_parts=1, columns=2048, out_dtype=_BF16),
    _product_case("nvfp4 in float32", part_rows=7168, num_parts=1, columns=2048, out_dtype=_FP32),
    _product_case("nvfp4 of odd size", part_rows=112, num_parts=2, columns=144, out_dtype=_BF16),
    _gate_up_case("nvfp4 gate and up", part_rows=2048, columns=7168),
    _gate_up_case("nvfp4 gate and up of odd size", part_rows=112, columns=144),
    _weight_only_case(
        "nvfp4 weights alone, w13", part_rows=2048, num_parts=2, columns=7168, out_dtype=_BF16
    ),
    _weight_only_case(
        "nvfp4 weights alone, w2", part_rows=7168, num_parts=1, columns=2048, out_dtype=_BF16
    ),
    _weight_only_case(
        "nvfp4 weights alone, odd size", part_rows=112, num_parts=2, columns=144, out_dtype=_FP32
    ),
)
"""Compiled ahead of time by the tests."""
