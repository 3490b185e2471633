"""Which expert each row belongs to, for kernels that ask row by row."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from mortise_cuda_common.chip import Architecture
from mortise_cuda_common.kernels.outputs import undefined
from mortise_cuda_common.kernels.row_experts_kernel import row_experts_program
from mortise_cuda_common.kernels.tilings import Constants, group_constants, power_of_two
from mortise_cuda_common.programs.base import CompileCase

if TYPE_CHECKING:
    from mortise_cuda_common.groups import Groups
    from mortise_cuda_common.programs.base import Programs

NUM_WARPS: Final = 4
COMPARISONS: Final = 4096
"""Rows times groups that one program compares: what its registers hold."""


def row_experts(programs: Programs, groups: Groups) -> torch.Tensor:
    """Find the group of every row; nothing waits for the device.

    Args:
        programs: what runs the program.
        groups: of the rows.

    Returns:
        int32 ``[R]``, -1 for rows of no group.
    """
    out_R = undefined((groups.num_rows,), torch.int32, groups.counts.device)
    programs.launch(
        row_experts_program,
        -(-groups.num_rows // _block_rows(groups.num_groups)),
        (groups.first_rows, groups.counts, out_R, groups.num_rows),
        _constants(groups.num_groups),
        num_warps=NUM_WARPS,
        num_stages=1,
    )
    return out_R


def _constants(num_groups: int) -> Constants:
    return {**group_constants(num_groups), "BLOCK_ROWS": _block_rows(num_groups)}


def _block_rows(num_groups: int) -> int:
    return max(1, COMPARISONS // power_of_two(num_groups))


def _case(num_groups: int) -> CompileCase:
    return CompileCase(
        name=f"experts of rows, {num_groups} groups",
        source=row_experts_program,
        signature={"first_rows": "*i32", "counts": "*i32", "out": "*i32", "num_rows": "i32"},
        constants=_constants(num_groups),
        architectures=tuple(Architecture),
        num_warps=NUM_WARPS,
        num_stages=1,
    )


CASES: Final = (_case(32), _case(256))
"""One rank of eight, and a single one, of DeepSeek-V3."""
