"""Rows that are quantised to e4m3, 128 columns at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, assert_never

import torch

from mortise.formats.fp8 import GROUP
from mortise.plugin import ScaleFormat
from mortise_cuda_common.chip import Architecture
from mortise_cuda_common.kernels.outputs import undefined, undefined_scales
from mortise_cuda_common.kernels.rows_kernel import rows_program
from mortise_cuda_common.kernels.tilings import (
    CHIPS,
    Constants,
    group_constants,
    rows_of_a_group,
)
from mortise_cuda_common.programs.base import CompileCase
from mortise_cuda_common.rows import Kind, Rows

if TYPE_CHECKING:
    from mortise_cuda_common.groups import Groups
    from mortise_cuda_common.programs.base import Programs

BLOCKS_M: Final = (8, 32)
"""Rows of a tile: few, or many."""

NUM_WARPS: Final = 4


def quantise_rows(
    programs: Programs, rows_RK: torch.Tensor, groups: Groups | None, scale_format: ScaleFormat
) -> Rows:
    """Quantise every 128 columns of a row, bit for bit as ``mortise.formats.fp8``.

    Args:
        programs: what runs the program.
        rows_RK: bfloat16 or float32 ``[R, K]``.
        groups: whose rows are quantised; None is all rows.
        scale_format: FLOAT32 or UE8M0.

    Returns:
        Rows whose scales ``[R, ceil(K/128)]`` lie column after column; those of no group are
        undefined.
    """
    return launch_rows(programs, rows_RK, groups, scale_format)


def launch_rows(
    programs: Programs,
    rows: torch.Tensor,
    groups: Groups | None,
    scale_format: ScaleFormat | None,
    *,
    gated: bool = False,
) -> Rows:
    """Gate rows, quantise them, or both.

    Args:
        programs: what runs the program.
        rows: ``[R, K]``, or of gate and up ``[R, 2K]``.
        groups: whose rows are taken; None is all.
        scale_format: of the results' scales; None leaves them unquantised.
        gated: whether they are gate and up.
    """
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    num_rows, width = rows.shape[0], rows.shape[1] // (2 if gated else 1)
    quantised = scale_format is not None
    dtype = torch.float8_e4m3fn if quantised else rows.dtype
    out = undefined((num_rows, width), dtype, rows.device)
    scales = undefined_scales(num_rows, width, rows.device) if quantised else None
    block_m = _block_m(num_rows if groups is None else rows_of_a_group(groups))
    if groups is None:
        tiles, places = -(-num_rows // block_m), (out, out)
    else:
        tiles, places = groups.most_tiles(block_m), (groups.first_rows, groups.counts)
    programs.launch(
        rows_program,
        tiles * -(-width // GROUP),
        (
            rows,
            out,
            out if scales is None else scales,
            *places,
            num_rows,
            rows.stride(0),
            0 if scales is None else scales.stride(1),
        ),
        constants(
            width,
            None if groups is None else groups.num_groups,
            block_m,
            gated=gated,
            scale_format=scale_format,
        ),
        num_warps=NUM_WARPS,
        num_stages=1,
    )
    return Rows(values=out, kind=kind_of(scale_format), scales=scales)


def constants(
    width: int,
    num_groups: int | None,
    block_m: int,
    *,
    gated: bool,
    scale_format: ScaleFormat | None,
) -> Constants:
    """What ``rows_program`` is compiled with."""
    return {
        "WIDTH": width,
        "GATED": gated,
        "QUANTISED": scale_format is not None,
        "POWERS_OF_TWO": scale_format is ScaleFormat.UE8M0,
        "GROUPED": num_groups is not None,
        **group_constants(num_groups or 1),
        "BLOCK_M": block_m,
        "BLOCK_N": GROUP,
    }


def kind_of(scale_format: ScaleFormat | None) -> Kind:
    """The rows that have scales of a format; None is rows without."""
    match scale_format:
        case None:
            return Kind.PLAIN
        case ScaleFormat.UE8M0:
            return Kind.FP8_UE8M0
        case ScaleFormat.FLOAT32:
            return Kind.FP8
        case ScaleFormat.E4M3:
            raise AssertionError("e4m3 rows have no e4m3 scales")
        case _:
            assert_never(scale_format)


def case(
    width: int,
    *,
    gated: bool,
    scale_format: ScaleFormat | None,
    block_m: int = BLOCKS_M[-1],
    chips: tuple[Architecture, ...] = CHIPS,
) -> CompileCase:
    """One way in which rows of 256 experts are taken."""
    what = ("gated " if gated else "") + kind_of(scale_format).value
    return CompileCase(
        name=f"{what} rows of {width} columns, {block_m} a tile",
        source=rows_program,
        signature={
            "rows": "*bf16",
            "out": "*bf16" if scale_format is None else "*fp8e4nv",
            "out_scales": "*bf16" if scale_format is None else "*fp32",
            "first_rows": "*i32",
            "counts": "*i32",
            "num_rows": "i32",
            "row_stride": "i32",
            "out_scale_step": "i32",
        },
        constants=constants(width, 256, block_m, gated=gated, scale_format=scale_format),
        architectures=chips,
        num_warps=NUM_WARPS,
        num_stages=1,
        divisible_by_16=("rows", "out", "out_scales", "first_rows", "counts", "row_stride"),
    )


def _block_m(rows: int) -> int:
    return next((block for block in BLOCKS_M if block >= rows), BLOCKS_M[-1])


CASES: Final = (
    case(7168, gated=False, scale_format=ScaleFormat.FLOAT32),
    case(7168, gated=False, scale_format=ScaleFormat.UE8M0, block_m=BLOCKS_M[0]),
    case(1000, gated=False, scale_format=ScaleFormat.UE8M0, chips=tuple(Architecture)),
)
"""Rows of DeepSeek-V3, and rows whose last scale is one of fewer columns."""
