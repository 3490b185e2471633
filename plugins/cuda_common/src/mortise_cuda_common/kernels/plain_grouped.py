"""Products of bfloat16 rows in groups with bfloat16 weights, one expert a group."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from mortise_cuda_common.chip import Architecture
from mortise_cuda_common.kernels.outputs import undefined
from mortise_cuda_common.kernels.plain_grouped_kernel import gate_up_program, product_program
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

    import torch

    from mortise_cuda_common.groups import Groups
    from mortise_cuda_common.programs.base import Programs

BLOCK_K: Final = 64

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
    Tiling(block_m=128, weight_first=False, num_warps=8, num_stages=4),
)
"""Tiles of 128 weight rows of gate and as many of up."""


def plain_product(
    programs: Programs,
    rows_RK: torch.Tensor,
    weight: torch.Tensor,
    groups: Groups,
    out_dtype: torch.dtype,
    *,
    tiling: Tiling | None = None,
) -> torch.Tensor:
    """Multiply each group of rows by the weight of its expert; sums in float32, rounded once.

    Args:
        programs: what runs the program.
        rows_RK: bfloat16 ``[R, K]``.
        weight: bfloat16 ``[E, N, K]``.
        groups: of the rows.
        out_dtype: of the result.
        tiling: how it is compiled; None chooses by shapes.

    Returns:
        ``[R, N]``; rows of no group are undefined.
    """
    _, num_columns, depth = weight.shape
    tiling = tiling or tiling_of(PRODUCT_TILINGS, groups, num_columns, NARROW)
    sizes: Constants = {"N": num_columns, "K": depth}
    out_RN = undefined((groups.num_rows, num_columns), out_dtype, rows_RK.device)
    _launch(programs, product_program, rows_RK, weight, out_RN, groups, sizes, tiling)
    return out_RN


def plain_gate_up(
    programs: Programs,
    rows_RK: torch.Tensor,
    w13: torch.Tensor,
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
        w13: bfloat16 ``[E, 2I, K]``, gate first.
        groups: of the rows.
        out_dtype: of the result.
        tiling: how it is compiled; None chooses by shapes.

    Returns:
        ``[R, I]``; rows of no group are undefined.
    """
    width, depth = w13.shape[1] // 2, w13.shape[2]
    tiling = tiling or tiling_of(GATE_UP_TILINGS, groups)
    sizes: Constants = {"WIDTH": width, "K": depth}
    out_RI = undefined((groups.num_rows, width), out_dtype, rows_RK.device)
    _launch(programs, gate_up_program, rows_RK, w13, out_RI, groups, sizes, tiling)
    return out_RI


def _launch(
    programs: Programs,
    source: Callable[..., None],
    rows: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    groups: Groups,
    sizes: Constants,
    tiling: Tiling,
) -> None:
    assert rows.dtype is weight.dtype
    programs.launch(
        source,
        groups.most_tiles(tiling.block_m) * -(-out.shape[1] // tiling.block_n),
        (rows.contiguous(), weight.contiguous(), out, groups.first_rows, groups.counts),
        sizes | _tile_constants(weight.shape[0], tiling),
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
    )


def _tile_constants(num_groups: int, tiling: Tiling) -> Constants:
    return {
        **group_constants(num_groups),
        "BLOCK_M": tiling.block_m,
        "BLOCK_N": tiling.block_n,
        "BLOCK_K": BLOCK_K,
        "WEIGHT_FIRST": tiling.weight_first,
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
    # Eight warps may share the columns of a tile.
    columns = tiling.block_m if tiling.weight_first else rf"({tiling.block_n}|64)"
    pointers = dict.fromkeys(("rows", "weight", "out"), "*bf16")
    shape = " x ".join(str(size) for size in sizes.values())
    return CompileCase(
        name=f"bf16 {source.__name__} {shape}, {tiling.block_m} rows a tile",
        source=source,
        signature={**pointers, "first_rows": "*i32", "counts": "*i32"},
        constants=sizes | _tile_constants(num_groups, tiling),
        architectures=chips,
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
        instructions=MappingProxyType(
            {
                Architecture.SM90: rf"wgmma\.mma_async\S*\.m64n{columns}k16\.f32\.bf16\.bf16",
                Architecture.SM100: _TCGEN05,
                Architecture.SM103: _TCGEN05,
            }
        ),
    )


CASES: Final = (
    *(_case(product_program, {"N": 7168, "K": 2048}, tiling) for tiling in PRODUCT_TILINGS),
    *(_case(gate_up_program, {"WIDTH": 2048, "K": 7168}, tiling) for tiling in GATE_UP_TILINGS),
    _case(product_program, {"N": 2880, "K": 1352}, PRODUCT_TILINGS[-1], chips=tuple(Architecture)),
    _case(
        gate_up_program, {"WIDTH": 1352, "K": 2888}, GATE_UP_TILINGS[0], chips=tuple(Architecture)
    ),
    _case(product_program, {"N": 2112, "K": 7168}, NARROW, num_groups=1),
)
"""Experts and a projection of DeepSeek-V3, and sizes that are no multiples of a tile's."""
