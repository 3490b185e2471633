"""Products of e4m3 rows in groups with e4m3 weights in blocks, one expert a group."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Final

import torch

from mortise.formats.fp8 import GROUP
from mortise.plugin import ScaleFormat
from mortise_cuda_common.chip import Architecture
from mortise_cuda_common.kernels.fp8_grouped_kernel import gate_up_program, product_program
from mortise_cuda_common.kernels.fp8_rows import kind_of
from mortise_cuda_common.kernels.outputs import undefined, undefined_scales
from mortise_cuda_common.kernels.tilings import (
    CHIPS,
    TILES_ABREAST,
    Constants,
    Tiling,
    group_constants,
    tiling_of,
)
from mortise_cuda_common.programs.base import CompileCase
from mortise_cuda_common.rows import Rows

if TYPE_CHECKING:
    from mortise_cuda_common.groups import Groups
    from mortise_cuda_common.programs.base import Programs

PRODUCT_TILINGS: Final = (
    Tiling(block_m=16, weight_first=True, num_warps=4, num_stages=4),
    Tiling(block_m=32, weight_first=True, num_warps=4, num_stages=4),
    Tiling(block_m=64, weight_first=False, num_warps=4, num_stages=4),
    Tiling(block_m=128, weight_first=False, num_warps=8, num_stages=4),
)
"""Tiles of 128 weight rows."""

NARROW: Final = Tiling(block_m=64, block_n=32, weight_first=False, num_warps=4, num_stages=5)
"""For few rows and few weights, so that every multiprocessor loads some of them."""

GATE_UP_TILINGS: Final = (
    Tiling(block_m=16, weight_first=True, num_warps=4, num_stages=3),
    Tiling(block_m=32, weight_first=True, num_warps=8, num_stages=3),
    Tiling(block_m=64, weight_first=False, num_warps=8, num_stages=4),
    Tiling(block_m=128, weight_first=False, num_warps=8, num_stages=3, most_spilled_bytes=160),
)
"""Tiles of 128 weight rows of gate and as many of up."""


def fp8_product(
    programs: Programs,
    rows: Rows,
    weight: torch.Tensor,
    scale: torch.Tensor,
    groups: Groups,
    out_dtype: torch.dtype,
    *,
    num_parts: int = 1,
    tiling: Tiling | None = None,
) -> torch.Tensor:
    """Multiply each group of rows by the weight of its expert.

    Sums of 128 columns are scaled and added up in float32 (DeepSeek-V3, arXiv 2412.19437, section
    3.3.2), and rounded once.

    Args:
        programs: what runs the program.
        rows: FP8 or FP8_UE8M0, ``[R, K]``.
        weight: e4m3 ``[E, N, K]``.
        scale: float32 ``[E, B, ceil(K/128)]``; B blocks of 128 rows, counted in each part of N.
        groups: of the rows.
        out_dtype: of the result.
        num_parts: equal parts of N that were projections of their own.
        tiling: how it is compiled; None chooses by shapes.

    Returns:
        ``[R, N]``; rows of no group are undefined.
    """
    assert rows.scales is not None
    assert rows.scales.dtype is torch.float32
    weight, scale, values = weight.contiguous(), scale.contiguous(), rows.values.contiguous()
    num_groups, num_columns, depth = weight.shape
    assert scale.shape == _scale_shape(num_groups, num_columns, depth, num_parts)
    out_RN = undefined((groups.num_rows, num_columns), out_dtype, values.device)
    tiling = tiling or tiling_of(PRODUCT_TILINGS, groups, num_columns, NARROW)
    column_tiles = num_parts * -(-(num_columns // num_parts) // tiling.block_n)
    programs.launch(
        product_program,
        groups.most_tiles(tiling.block_m) * column_tiles,
        (
            values,
            rows.scales,
            weight,
            scale,
            out_RN,
            groups.first_rows,
            groups.counts,
            *rows.scales.stride(),
        ),
        _product_constants(num_groups, num_columns, depth, num_parts, tiling),
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
    )
    return out_RN


def fp8_gate_up(
    programs: Programs,
    rows: Rows,
    w13: torch.Tensor,
    w13_scale: torch.Tensor,
    groups: Groups,
    then: ScaleFormat | None,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
    tiling: Tiling | None = None,
) -> Rows:
    """Multiply each group by gate over up of its expert, gate the sums, and quantise: one program.

    Nothing is rounded between the sums and the result: silu(gate) * up is taken in float32.

    Args:
        programs: what runs the program.
        rows: FP8 or FP8_UE8M0, ``[R, K]``.
        w13: e4m3 ``[E, 2I, K]``, gate first.
        w13_scale: float32 ``[E, 2 * ceil(I/128), ceil(K/128)]``.
        groups: of the rows.
        then: format of the scales of the result; None leaves it unquantised.
        out_dtype: of an unquantised result.
        tiling: how it is compiled, 128 weight rows a tile; None chooses by shapes.

    Returns:
        Rows ``[R, I]``; those of no group are undefined.
    """
    assert rows.scales is not None
    assert rows.scales.dtype is torch.float32
    w13, w13_scale, values = w13.contiguous(), w13_scale.contiguous(), rows.values.contiguous()
    num_groups, depth = w13.shape[0], w13.shape[2]
    width = w13.shape[1] // 2
    assert w13_scale.shape == _scale_shape(num_groups, 2 * width, depth, 2)
    quantised = then is not None
    dtype = torch.float8_e4m3fn if quantised else out_dtype
    out_RI = undefined((groups.num_rows, width), dtype, values.device)
    out_scales = undefined_scales(groups.num_rows, width, values.device) if quantised else None
    tiling = tiling or tiling_of(GATE_UP_TILINGS, groups)
    assert tiling.block_n == GROUP
    programs.launch(
        gate_up_program,
        groups.most_tiles(tiling.block_m) * -(-width // GROUP),
        (
            values,
            rows.scales,
            w13,
            w13_scale,
            out_RI,
            out_RI if out_scales is None else out_scales,
            groups.first_rows,
            groups.counts,
            *rows.scales.stride(),
            0 if out_scales is None else out_scales.stride(1),
        ),
        _gate_up_constants(num_groups, width, depth, then, tiling),
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
    )
    return Rows(values=out_RI, kind=kind_of(then), scales=out_scales)


def _scale_shape(num_groups: int, rows: int, depth: int, num_parts: int) -> tuple[int, int, int]:
    return (num_groups, num_parts * -(-(rows // num_parts) // GROUP), -(-depth // GROUP))


def _product_constants(
    num_groups: int, num_columns: int, depth: int, num_parts: int, tiling: Tiling
) -> Constants:
    sizes: Constants = {"N": num_columns, "K": depth, "PARTS": num_parts}
    return sizes | _tile_constants(num_groups, tiling)


def _gate_up_constants(
    num_groups: int, width: int, depth: int, then: ScaleFormat | None, tiling: Tiling
) -> Constants:
    sizes: Constants = {
        "WIDTH": width,
        "K": depth,
        "QUANTISED": then is not None,
        "POWERS_OF_TWO": then is ScaleFormat.UE8M0,
    }
    return sizes | _tile_constants(num_groups, tiling)


def _tile_constants(num_groups: int, tiling: Tiling) -> Constants:
    return {
        **group_constants(num_groups),
        "BLOCK_M": tiling.block_m,
        "BLOCK_N": tiling.block_n,
        "BLOCK_K": GROUP,
        "WEIGHT_FIRST": tiling.weight_first,
        "TILES_ABREAST": TILES_ABREAST,
    }


_POINTERS: Final = MappingProxyType(
    {
        "rows": "*fp8e4nv",
        "row_scales": "*fp32",
        "weight": "*fp8e4nv",
        "weight_scale": "*fp32",
    }
)
_PLACES: Final = MappingProxyType({"first_rows": "*i32", "counts": "*i32"})
_TCGEN05: Final = r"tcgen05\.mma\.cta_group::1\.kind::f8f6f4"


def _instructions(tiling: Tiling) -> dict[Architecture, str]:
    # Eight warps may share the columns of a tile.
    columns = tiling.block_m if tiling.weight_first else rf"({tiling.block_n}|64)"
    return {
        Architecture.SM90: rf"wgmma\.mma_async\S*\.m64n{columns}k32\.f32\.e4m3\.e4m3",
        Architecture.SM100: _TCGEN05,
        Architecture.SM103: _TCGEN05,
    }


def _product_case(
    tiling: Tiling,
    num_columns: int,
    depth: int,
    num_parts: int = 1,
    *,
    num_groups: int = 32,
    chips: tuple[Architecture, ...] = CHIPS,
) -> CompileCase:
    pointers = {**_POINTERS, "out": "*bf16", **_PLACES}
    strides = ("scale_row_step", "scale_column_step")
    return CompileCase(
        name=f"fp8 product {num_groups} x {num_columns} x {depth}, {tiling.block_m} rows a tile",
        source=product_program,
        signature={**pointers, **dict.fromkeys(strides, "i32")},
        constants=_product_constants(num_groups, num_columns, depth, num_parts, tiling),
        architectures=chips,
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
        instructions=MappingProxyType(_instructions(tiling)),
        most_spilled_bytes=tiling.most_spilled_bytes,
    )


def _gate_up_case(
    tiling: Tiling,
    width: int,
    depth: int,
    then: ScaleFormat | None,
    chips: tuple[Architecture, ...] = CHIPS,
) -> CompileCase:
    out = {
        "out": "*bf16" if then is None else "*fp8e4nv",
        "out_scales": "*bf16" if then is None else "*fp32",
    }
    strides = ("scale_row_step", "scale_column_step", "out_scale_step")
    return CompileCase(
        name=f"fp8 gate and up {width} x {depth}, {kind_of(then).value}, {tiling.block_m} rows",
        source=gate_up_program,
        signature={**_POINTERS, **out, **_PLACES, **dict.fromkeys(strides, "i32")},
        constants=_gate_up_constants(32, width, depth, then, tiling),
        architectures=chips,
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
        instructions=MappingProxyType(_instructions(tiling)),
        most_spilled_bytes=tiling.most_spilled_bytes,
    )


CASES: Final = (
    *(_product_case(tiling, 7168, 2048) for tiling in PRODUCT_TILINGS),
    _product_case(PRODUCT_TILINGS[-1], 2 * 1344, 2880, 2, chips=tuple(Architecture)),
    _product_case(NARROW, 2112, 7168, num_groups=1),
    *(_gate_up_case(tiling, 2048, 7168, ScaleFormat.UE8M0) for tiling in GATE_UP_TILINGS),
    *(_gate_up_case(tiling, 2048, 7168, ScaleFormat.FLOAT32) for tiling in GATE_UP_TILINGS[::3]),
    _gate_up_case(GATE_UP_TILINGS[0], 1344, 2880, ScaleFormat.UE8M0, tuple(Architecture)),
    _gate_up_case(GATE_UP_TILINGS[2], 2048, 7168, None),
)
"""Experts and a projection of DeepSeek-V3, and sizes that are no multiples of 128."""
