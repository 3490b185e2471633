"""Rows quantised to NVFP4: plain ones, and those that SwiGLU makes of gate and up."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from mortise_cuda_blackwell.kernels.cases import BLACKWELL, COUNTS
from mortise_cuda_blackwell.kernels.nvfp4_rows_kernel import quantise_kernel
from mortise_cuda_common.programs.base import CompileCase
from mortise_cuda_common.rows import Kind, Rows

if TYPE_CHECKING:
    from mortise_cuda_common.groups import Groups
    from mortise_cuda_common.programs.base import Programs

BLOCK_ROWS: Final = 16
BLOCK_COLUMNS: Final = 256


def quantise_rows(
    programs: Programs, plain_RK: torch.Tensor, global_scales_E: torch.Tensor, groups: Groups
) -> Rows:
    """Quantise blocks of 16 columns under a known global scale, as ``mortise.formats.nvfp4`` does.

    Args:
        programs: runs it.
        plain_RK: bfloat16 or float32 ``[R, K]``, K a multiple of 16; columns are adjacent.
        global_scales_E: float32 ``[E]``, the factor of each group.
        groups: the rows of each expert; others are not read.

    Returns:
        The rows; ``global_scale`` is None, as each group has the one it was given.
    """
    return _quantise(programs, plain_RK, global_scales_E, groups, swiglu=False)


def swiglu_quantise(
    programs: Programs, gate_up_R2I: torch.Tensor, global_scales_E: torch.Tensor, groups: Groups
) -> Rows:
    """Quantise silu(gate) * up, which is rounded as often as tensors of its dtype are.

    Args:
        programs: runs it.
        gate_up_R2I: bfloat16 or float32 ``[R, 2I]``, I a multiple of 16.
        global_scales_E: float32 ``[E]``, the factor of each group.
        groups: the rows of each expert; others are not read.
    """
    return _quantise(programs, gate_up_R2I, global_scales_E, groups, swiglu=True)


def _quantise(
    programs: Programs, plain: torch.Tensor, scales_E: torch.Tensor, groups: Groups, *, swiglu: bool
) -> Rows:
    num_rows, columns = plain.shape[0], plain.shape[1] // (2 if swiglu else 1)
    assert columns % 16 == 0, columns
    assert plain.stride(1) == 1
    values = plain.new_empty((num_rows, columns // 2), dtype=torch.uint8)
    scales = plain.new_empty((num_rows, columns // 16), dtype=torch.float8_e4m3fn)
    programs.launch(
        quantise_kernel,
        groups.most_tiles(BLOCK_ROWS) * -(-columns // BLOCK_COLUMNS),
        (plain, values, scales, scales_E.reciprocal(), groups.first_rows, groups.counts),
        constants(
            row_stride=plain.stride(0),
            columns=columns,
            swiglu=swiglu,
            rounded=plain.dtype is torch.bfloat16,
            num_groups=groups.num_groups,
        ),
    )
    return Rows(values=values, kind=Kind.NVFP4, scales=scales)


def constants(
    *, row_stride: int, columns: int, swiglu: bool, rounded: bool, num_groups: int
) -> dict[str, int | float | bool]:
    """The constants of a launch."""
    return {
        "ROW_STRIDE": row_stride,
        "COLUMNS": columns,
        "SWIGLU": swiglu,
        "ROUNDED": rounded,
        "NUM_GROUPS": num_groups,
        "GROUP_BLOCK": power_of_two(num_groups),
        "BLOCK_ROWS": BLOCK_ROWS,
        "BLOCK_COLUMNS": BLOCK_COLUMNS,
    }


def power_of_two(number: int) -> int:
    """The smallest power of two that is no smaller."""
    return 1 << (number - 1).bit_length()


def _case(name: str, dtype: str, *, columns: int, swiglu: bool) -> CompileCase:
    return CompileCase(
        name=name,
        source=quantise_kernel,
        signature={
            "rows": f"*{dtype}",
            "values": "*u8",
            "scales": "*fp8e4nv",
            "divisors": "*fp32",
            **COUNTS,
        },
        constants=constants(
            row_stride=columns * (2 if swiglu else 1),
            columns=columns,
            swiglu=swiglu,
            rounded=dtype == "bf16",
            num_groups=32,
        ),
        architectures=BLACKWELL,
    )


CASES: Final = (
    _case("nvfp4 rows of bfloat16", "bf16", columns=7168, swiglu=False),
    _case("nvfp4 rows of float32", "fp32", columns=7168, swiglu=False),
    _case("nvfp4 rows of an odd number of blocks", "bf16", columns=2064, swiglu=False),
    _case("nvfp4 rows of gate and up", "bf16", columns=2048, swiglu=True),
    _case("nvfp4 rows of gate and up in float32", "fp32", columns=2048, swiglu=True),
)
"""Compiled ahead of time by the tests."""
