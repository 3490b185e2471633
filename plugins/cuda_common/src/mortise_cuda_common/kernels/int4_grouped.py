"""Products of bfloat16 rows in groups with int4 weights, one expert a group."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from mortise_cuda_common.chip import Architecture
from mortise_cuda_common.kernels.int4_grouped_kernel import gate_up_program, product_program
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
    from collections.abc import Callable

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


GATE_UP_TILINGS: Final = (
    Tiling(block_m=16, block_n=64, weight_first=True, num_warps=4, num_stages=4),
    Tiling(block_m=32, weight_first=True, num_warps=8, num_stages=4),
    Tiling(block_m=64, weight_first=True, num_warps=8, num_stages=4),
    Tiling(block_m=128, block_n=64, weight_first=True, num_warps=8, num_stages=4),
)
"""Tiles of 64 or 128 weight rows of gate and as many of up."""


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
    _, num_columns, num_words = words.shape
    tiling = tiling or tiling_of(TILINGS, groups, num_columns, NARROW)
    out_RN = undefined((groups.num_rows, num_columns), out_dtype, rows_RK.device)
    sizes = _sizes("N", num_columns, num_words * VALUES_PER_WORD, scale.shape[2])
    _launch(programs, product_program, (rows_RK, words, scale, out_RN), groups, sizes, tiling)
    return out_RN


def int4_gate_up(
    programs: Programs,
    rows_RK: torch.Tensor,
    words: torch.Tensor,
    scale: torch.Tensor,
    groups: Groups,
    out_dtype: torch.dtype,
    *,
    tiling: Tiling | None = None,
) -> torch.Tensor:
    """Multiply each group by gate over up of its expert, and gate the sums: one program.

    Nothing is rounded between the sums and the result: silu(gate) * up is taken in float32.

    Args:
        programs: what runs the program.
        rows_RK: bfloat16 ``[R, K]``.
        words: int32 ``[E, 2I, K/8]``, gate first.
        scale: float32 ``[E, 2I, G]``, for groups of a multiple of 8 columns.
        groups: of the rows.
        out_dtype: of the result.
        tiling: how it is compiled; None chooses by shapes.

    Returns:
        ``[R, I]``; rows of no group are undefined.
    """
    width, num_words = words.shape[1] // 2, words.shape[2]
    tiling = tiling or tiling_of(GATE_UP_TILINGS, groups)
    out_RI = undefined((groups.num_rows, width), out_dtype, rows_RK.device)
    sizes = _sizes("WIDTH", width, num_words * VALUES_PER_WORD, scale.shape[2])
    _launch(programs, gate_up_program, (rows_RK, words, scale, out_RI), groups, sizes, tiling)
    return out_RI


def takes_columns(depth: int, column_groups: int) -> bool:
    """Whether the program unpacks weights of K columns in so many groups."""
    return depth % (VALUES_PER_WORD * column_groups) == 0


def _launch(
    programs: Programs,
    source: Callable[..., None],
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    groups: Groups,
    sizes: Constants,
    tiling: Tiling,
) -> None:
    rows, words, scale, out = tensors
    assert rows.dtype is torch.bfloat16
    programs.launch(
        source,
        groups.most_tiles(tiling.block_m) * -(-out.shape[1] // tiling.block_n),
        (
            rows.contiguous(),
            words.contiguous(),
            scale.contiguous(),
            out,
            groups.first_rows,
            groups.counts,
        ),
        sizes | _tile_constants(words.shape[0], tiling),
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
    )


def _sizes(columns: str, num_columns: int, depth: int, column_groups: int) -> Constants:
    assert takes_columns(depth, column_groups), "columns of a scale are a multiple of 8"
    return {columns: num_columns, "K": depth, "COLUMN_GROUPS": column_groups}


def _tile_constants(num_groups: int, tiling: Tiling) -> Constants:
    return {
        **group_constants(num_groups),
        "BLOCK_M": tiling.block_m,
        "BLOCK_N": tiling.block_n,
        "BLOCK_K": BLOCK_K,
        "TILES_ABREAST": TILES_ABREAST,
    }


_TCGEN05: Final = r"tcgen05\.mma\.cta_group::1\.kind::f16"


def _case(
    source: Callable[..., None],
    sizes: Constants,
    tiling: Tiling,
    *,
    num_groups: int = 32,
    chips: tuple[Architecture, ...] = CHIPS,
) -> CompileCase:
    shape = " x ".join(str(size) for size in sizes.values())
    return CompileCase(
        name=f"int4 {source.__name__} {num_groups} x {shape} scales, {tiling.block_m} rows a tile",
        source=source,
        signature={
            "rows": "*bf16",
            "words": "*i32",
            "weight_scale": "*fp32",
            "out": "*bf16",
            "first_rows": "*i32",
            "counts": "*i32",
        },
        constants=sizes | _tile_constants(num_groups, tiling),
        architectures=chips,
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
        instructions={
            # Eight warps may share the columns of a tile.
            Architecture.SM90: rf"wgmma\S*\.m64n({tiling.block_m}|64)k16\.f32\.bf16\.bf16",
            Architecture.SM100: _TCGEN05,
            Architecture.SM103: _TCGEN05,
        },
    )


_DOWN: Final = (7168, 2048)
_GATE_UP: Final = (2048, 7168)

CASES: Final = (
    *(_case(product_program, _sizes("N", *_DOWN, 16), tiling) for tiling in TILINGS),
    *(_case(gate_up_program, _sizes("WIDTH", *_GATE_UP, 56), one) for one in GATE_UP_TILINGS),
    _case(product_program, _sizes("N", *_DOWN, 1), TILINGS[-1]),
    _case(product_program, _sizes("N", *_DOWN, 64), TILINGS[-1]),
    _case(gate_up_program, _sizes("WIDTH", *_GATE_UP, 224), GATE_UP_TILINGS[-1]),
    _case(product_program, _sizes("N", 1352, 2880, 90), TILINGS[0], chips=tuple(Architecture)),
    _case(gate_up_program, _sizes("WIDTH", 1352, 2880, 90), GATE_UP_TILINGS[0]),
    _case(product_program, _sizes("N", 2112, 7168, 56), NARROW, num_groups=1),
)
"""Scales for 128 columns in every tiling; for all columns, for 32; and sizes not those of tiles."""
