"""Products of bfloat16 rows in groups with int4 weights, one expert a group."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Final

import torch

from mortise_cuda_common.chip import Architecture
from mortise_cuda_common.kernels.int4_grouped_kernel import product_program
from mortise_cuda_common.kernels.outputs import undefined
from mortise_cuda_common.kernels.tilings import (
    CHIPS,
    TILES_ABREAST,
    Constants,
    Tiling,
    group_constants,
    tiling_of,
)
from mortise_cuda_common.programs.base import CompileCase

if TYPE_CHECKING:
    from mortise_cuda_common.groups import Groups
    from mortise_cuda_common.programs.base import Programs

BLOCK_K: Final = 64
VALUES_PER_WORD: Final = 8

TILINGS: Final = (
    Tiling(block_m=16, weight_first=True, num_warps=4, num_stages=4),
    Tiling(block_m=32, weight_first=True, num_warps=4, num_stages=4),
    Tiling(block_m=64, weight_first=True, num_warps=4, num_stages=4),
    Tiling(block_m=128, weight_first=True, num_warps=8, num_stages=4),
)
"""Tiles of 128 weight rows, always the first operand: that one may be unpacked in registers."""

NARROW: Final = Tiling(block_m=64, block_n=64, weight_first=True, num_warps=4, num_stages=4)
"""For few rows and few weights, so that more multiprocessors load some of them."""


def int4_product(
    programs: Programs,
    rows_RK: torch.Tensor,
    words: torch.Tensor,
    scale: torch.Tensor,
    groups: Groups,
    out_dtype: torch.dtype,
    *,
    tiling: Tiling | None = None,
) -> torch.Tensor:
    """Multiply each group of rows by the weight of its expert; sums in float32, rounded once.

    A weight is its integer times its scale in float32, rounded once to bfloat16.

    Args:
        programs: what runs the program.
        rows_RK: bfloat16 ``[R, K]``.
        words: int32 ``[E, N, K/8]``, the lowest nibble first.
        scale: float32 ``[E, N, G]``, for groups of a multiple of 8 columns.
        groups: of the rows.
        out_dtype: of the result.
        tiling: how it is compiled; None chooses by shapes.

    Returns:
        ``[R, N]``; rows of no group are undefined.
    """
    assert rows_RK.dtype is torch.bfloat16
    words, scale = words.contiguous(), scale.contiguous()
    num_groups, num_columns, num_words = words.shape
    tiling = tiling or tiling_of(TILINGS, groups, num_columns, NARROW)
    out_RN = undefined((groups.num_rows, num_columns), out_dtype, rows_RK.device)
    programs.launch(
        product_program,
        groups.most_tiles(tiling.block_m) * -(-num_columns // tiling.block_n),
        (rows_RK.contiguous(), words, scale, out_RN, groups.first_rows, groups.counts),
        _constants(num_groups, num_columns, num_words * VALUES_PER_WORD, scale.shape[2], tiling),
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
    )
    return out_RN


def takes_columns(depth: int, column_groups: int) -> bool:
    """Whether the program unpacks weights of K columns in so many groups."""
    return depth % (VALUES_PER_WORD * column_groups) == 0


def _constants(
    num_groups: int, num_columns: int, depth: int, column_groups: int, tiling: Tiling
) -> Constants:
    assert takes_columns(depth, column_groups), "columns of a scale are a multiple of 8"
    return {
        "N": num_columns,
        "K": depth,
        "COLUMN_GROUPS": column_groups,
        **group_constants(num_groups),
        "BLOCK_M": tiling.block_m,
        "BLOCK_N": tiling.block_n,
        "BLOCK_K": BLOCK_K,
        "TILES_ABREAST": TILES_ABREAST,
    }


_TCGEN05: Final = r"tcgen05\.mma\.cta_group::1\.kind::f16"


def _case(
    num_columns: int,
    depth: int,
    column_groups: int,
    tiling: Tiling,
    *,
    num_groups: int = 32,
    chips: tuple[Architecture, ...] = CHIPS,
) -> CompileCase:
    return CompileCase(
        name=f"int4 product {num_groups} x {num_columns} x {depth}, {column_groups} scales, "
        f"{tiling.block_m} rows",
        source=product_program,
        signature={
            "rows": "*bf16",
            "words": "*i32",
            "weight_scale": "*fp32",
            "out": "*bf16",
            "first_rows": "*i32",
            "counts": "*i32",
        },
        constants=_constants(num_groups, num_columns, depth, column_groups, tiling),
        architectures=chips,
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
        instructions=MappingProxyType(
            {
                Architecture.SM90: rf"wgmma\S*\.m64n{tiling.block_m}k16\.f32\.bf16\.bf16",
                Architecture.SM100: _TCGEN05,
                Architecture.SM103: _TCGEN05,
            }
        ),
    )


CASES: Final = (
    *(_case(7168, 2048, 16, tiling) for tiling in TILINGS),
    _case(7168, 2048, 1, TILINGS[-1]),
    _case(7168, 2048, 64, TILINGS[-1]),
    _case(1352, 2880, 90, TILINGS[0], chips=tuple(Architecture)),
    _case(2112, 7168, 56, NARROW, num_groups=1),
)
"""Scales for 128 columns in every tiling; for all columns, for 32; and sizes not those of tiles."""
