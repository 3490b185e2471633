"""silu(gate) * up of rows that hold both, gate first, and the same quantised to e4m3."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from mortise.plugin import ScaleFormat
from mortise_cuda_common.kernels.fp8_rows import BLOCKS_M, case, launch_rows

if TYPE_CHECKING:
    import torch

    from mortise_cuda_common.groups import Groups
    from mortise_cuda_common.programs.base import Programs
    from mortise_cuda_common.rows import Rows


def swiglu(programs: Programs, gate_up_R2I: torch.Tensor, groups: Groups | None) -> torch.Tensor:
    """silu(gate) * up, computed in float32 and rounded as often as torch rounds tensors.

    Args:
        programs: what runs the program.
        gate_up_R2I: bfloat16 or float32 ``[R, 2I]``.
        groups: whose rows are taken; None is all.

    Returns:
        ``[R, I]`` of the same dtype; rows of no group are undefined.
    """
    return launch_rows(programs, gate_up_R2I, groups, None, gated=True).values


def swiglu_quantise(
    programs: Programs,
    gate_up_R2I: torch.Tensor,
    groups: Groups | None,
    scale_format: ScaleFormat,
) -> Rows:
    """As ``quantise_rows`` of ``swiglu``, bit for bit, in one program.

    Args:
        programs: what runs the program.
        gate_up_R2I: bfloat16 or float32 ``[R, 2I]``.
        groups: whose rows are taken; None is all.
        scale_format: FLOAT32 or UE8M0.
    """
    return launch_rows(programs, gate_up_R2I, groups, scale_format, gated=True)


CASES: Final = (
    case(2048, gated=True, scale_format=None),
    case(2048, gated=True, scale_format=ScaleFormat.FLOAT32, block_m=BLOCKS_M[0]),
    case(2048, gated=True, scale_format=ScaleFormat.UE8M0),
)
"""Experts of DeepSeek-V3."""
