"""Products of grouped rows with the NVFP4 weights of their experts."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

import torch

from mortise_cuda_blackwell.kernels import nvfp4_gate_up_kernel as gate_up
from mortise_cuda_blackwell.kernels import nvfp4_grouped_kernel as grouped
from mortise_cuda_blackwell.kernels import nvfp4_weight_only_kernel as weight_only
from mortise_cuda_blackwell.kernels.cases import (
    ADJACENT,
    BF16_INSTRUCTION,
    BLACKWELL,
    COUNTS,
    FP4_INSTRUCTION,
    STRIDES,
)
from mortise_cuda_blackwell.kernels.nvfp4_rows import power_of_two
from mortise_cuda_common.kernels.tilings import rows_of_a_group
from mortise_cuda_common.programs.base import CompileCase
from mortise_cuda_common.rows import Kind, Rows

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mortise_cuda_blackwell.layout import Nvfp4Weight
    from mortise_cuda_common.chip import Architecture
    from mortise_cuda_common.groups import Groups
    from mortise_cuda_common.programs.base import Programs

TILE: Final = 128
"""Rows of a weight, of one part, that one program multiplies: what the tensor core takes."""

BLOCK_ROWS: Final = (16, 32, 64, 128)
"""Rows that it multiplies them by: the fewest that hold what a group is expected to have."""

BLOCK_COLUMNS: Final = 256
GATE_UP_WARPS: Final = 8
"""Of gate and up in one program: four of them spill registers where rows are many."""

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
    block_rows = block_rows_of(groups)
    programs.launch(
        grouped.product_kernel,
        groups.most_tiles(block_rows) * weight.num_parts * -(-weight.part_rows // TILE),
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
            *_strides(rows),
        ),
        product_constants(
            part_rows=weight.part_rows,
            num_parts=weight.num_parts,
            columns=weight.columns,
            out_dtype=out_dtype,
            num_groups=groups.num_groups,
            block_rows=block_rows,
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
    block_rows = block_rows_of(groups)
    programs.launch(
        gate_up.gate_up_kernel,
        groups.most_tiles(block_rows) * -(-weight.part_rows // TILE),
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
            *_strides(rows),
        ),
        gate_up_constants(
            part_rows=weight.part_rows,
            columns=weight.columns,
            num_groups=groups.num_groups,
            block_rows=block_rows,
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
    block_rows = block_rows_of(groups)
    programs.launch(
        weight_only.product_kernel,
        groups.most_tiles(block_rows) * weight.num_parts * -(-weight.part_rows // TILE),
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
            block_rows=block_rows,
        ),
    )
    return output


def _strides(rows: Rows) -> tuple[int, int, int]:
    """Bytes from row to row, and scales from row to row and from column to column."""
    assert rows.scales is not None and rows.values.stride(1) == 1
    return rows.values.stride(0), rows.scales.stride(0), rows.scales.stride(1)


def block_rows_of(groups: Groups) -> int:
    """Rows of a tile, by what the host knows of the rows that a group has."""
    rows = rows_of_a_group(groups)
    return next((block for block in BLOCK_ROWS if block >= rows), BLOCK_ROWS[-1])


def product_constants(
    *,
    part_rows: int,
    num_parts: int,
    columns: int,
    out_dtype: torch.dtype,
    num_groups: int,
    block_rows: int,
) -> dict[str, int | float | bool]:
    """The constants of a launch of :func:`nvfp4_product`."""
    return {
        "PART_ROWS": part_rows,
        "NUM_PARTS": num_parts,
        "COLUMNS": columns,
        "OUTPUT_BF16": out_dtype is torch.bfloat16,
        "NUM_GROUPS": num_groups,
        "GROUP_BLOCK": power_of_two(num_groups),
        "BLOCK_ROWS": block_rows,
        "BLOCK_COLUMNS": BLOCK_COLUMNS,
    }


def gate_up_constants(
    *, part_rows: int, columns: int, num_groups: int, block_rows: int
) -> dict[str, int | float | bool]:
    """The constants of a launch of :func:`nvfp4_gate_up`."""
    return {
        "PART_ROWS": part_rows,
        "COLUMNS": columns,
        "NUM_GROUPS": num_groups,
        "GROUP_BLOCK": power_of_two(num_groups),
        "BLOCK_ROWS": block_rows,
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
    block_rows: int,
) -> dict[str, int | float | bool]:
    """The constants of a launch of :func:`weight_only_product`."""
    return {
        **product_constants(
            part_rows=part_rows,
            num_parts=num_parts,
            columns=columns,
            out_dtype=out_dtype,
            num_groups=num_groups,
            block_rows=block_rows,
        ),
        "ROW_STRIDE": row_stride,
        "BLOCK_COLUMNS": PLAIN_BLOCK_COLUMNS,
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shape:
    """Of a weight, and what it is multiplied by and into."""

    name: str
    part_rows: int
    num_parts: int
    columns: int
    out_dtype: torch.dtype = torch.bfloat16
    block_rows: int

    @property
    def architectures(self) -> tuple[Architecture, ...]:
        """B300's compiler is B200's but for the name: the outermost sizes show that."""
        outermost = self.block_rows in {BLOCK_ROWS[0], BLOCK_ROWS[-1]}
        return BLACKWELL if outermost else BLACKWELL[:1]

    @property
    def divisible(self) -> tuple[str, ...]:
        """Strides that a launch finds to be multiples of 16."""
        strides = {"row_stride": self.columns // 2, "scale_row_stride": self.columns // 16}
        return tuple(name for name, stride in strides.items() if stride % 16 == 0)

    @property
    def output(self) -> str:
        """Type of the result."""
        return "*bf16" if self.out_dtype is torch.bfloat16 else "*fp32"


_OPERANDS: Final = MappingProxyType(
    {"rows": "*u8", "row_scales": "*fp8e4nv", "weight": "*u8", "weight_scales": "*fp8e4nv"}
)


def _product_case(shape: _Shape) -> CompileCase:
    pointers = {**_OPERANDS, "alphas": "*fp32", "output": shape.output, **COUNTS}
    return CompileCase(
        name=f"nvfp4, {shape.name}, {shape.block_rows} rows",
        source=grouped.product_kernel,
        signature={**pointers, "row_alpha": "fp32", **STRIDES},
        constants={
            **ADJACENT,
            **product_constants(
                part_rows=shape.part_rows,
                num_parts=shape.num_parts,
                columns=shape.columns,
                out_dtype=shape.out_dtype,
                num_groups=32,
                block_rows=shape.block_rows,
            ),
        },
        divisible_by_16=(*pointers, *shape.divisible),
        architectures=shape.architectures,
        instructions=FP4_INSTRUCTION,
    )


def _gate_up_case(shape: _Shape) -> CompileCase:
    results = {"divisors": "*fp32", "values": "*u8", "scales": "*fp8e4nv"}
    pointers = {**_OPERANDS, "alphas": "*fp32", **results, **COUNTS}
    return CompileCase(
        name=f"nvfp4 gate and up, {shape.name}, {shape.block_rows} rows",
        source=gate_up.gate_up_kernel,
        signature={**pointers, "row_alpha": "fp32", **STRIDES},
        constants={
            **ADJACENT,
            **gate_up_constants(
                part_rows=shape.part_rows,
                columns=shape.columns,
                num_groups=32,
                block_rows=shape.block_rows,
            ),
        },
        divisible_by_16=(*pointers, *shape.divisible),
        architectures=shape.architectures,
        num_warps=GATE_UP_WARPS,
        instructions=FP4_INSTRUCTION,
    )


def _weight_only_case(shape: _Shape) -> CompileCase:
    return CompileCase(
        name=f"nvfp4 weights alone, {shape.name}, {shape.block_rows} rows",
        source=weight_only.product_kernel,
        signature={
            "rows": "*bf16",
            "weight": "*u8",
            "weight_scales": "*fp8e4nv",
            "alphas": "*fp32",
            "output": shape.output,
            **COUNTS,
        },
        constants=weight_only_constants(
            row_stride=shape.columns,
            part_rows=shape.part_rows,
            num_parts=shape.num_parts,
            columns=shape.columns,
            out_dtype=shape.out_dtype,
            num_groups=32,
            block_rows=shape.block_rows,
        ),
        architectures=shape.architectures,
        instructions=BF16_INSTRUCTION,
    )


def _shapes() -> Iterator[_Shape]:
    """Those of DeepSeek-V3, and one of odd sizes."""
    for rows in BLOCK_ROWS:
        yield _Shape(name="w13", part_rows=2048, num_parts=2, columns=7168, block_rows=rows)
    yield _Shape(name="w2", part_rows=7168, num_parts=1, columns=2048, block_rows=BLOCK_ROWS[-1])
    yield _Shape(
        name="odd sizes",
        part_rows=112,
        num_parts=2,
        columns=144,
        out_dtype=torch.float32,
        block_rows=BLOCK_ROWS[0],
    )


CASES: Final = (
    *(_product_case(shape) for shape in _shapes()),
    *(_gate_up_case(shape) for shape in _shapes() if shape.num_parts == 2),
    *(_weight_only_case(shape) for shape in _shapes()),
)
"""Compiled ahead of time by the tests."""
