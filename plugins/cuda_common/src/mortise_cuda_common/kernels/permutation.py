"""Rows of tokens brought into the groups of their experts, and their results back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch

from mortise.formats.fp8 import GROUP
from mortise.plugin import ScaleFormat
from mortise_cuda_common.chip import Architecture
from mortise_cuda_common.groups import Groups
from mortise_cuda_common.kernels.fp8_rows import kind_of
from mortise_cuda_common.kernels.outputs import undefined, undefined_scales
from mortise_cuda_common.kernels.permutation_kernel import (
    permute_program,
    rank_program,
    unpermute_program,
)
from mortise_cuda_common.kernels.tilings import Constants, group_constants, power_of_two
from mortise_cuda_common.programs.base import CompileCase
from mortise_cuda_common.rows import Rows

if TYPE_CHECKING:
    from mortise_cuda_common.programs.base import Programs

RANK_BLOCKS: Final = (1024, 4096)
"""Choices that a program looks at together: of few tokens, of many."""

MOST_COLUMN_GROUPS: Final = 16
"""Groups of 128 columns that a program moves."""

MOST_COLUMNS: Final = 1024
"""Columns that a program sums."""

RANK_WARPS: Final = 8
NUM_WARPS: Final = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Permuted:
    """Rows in the groups of their experts.

    Args:
        rows: ``[R, H]``, sorted by expert, then token, then choice; R is a bound that depends on
            shapes alone, and rows of no group are undefined.
        groups: which rows are whose.
        row_of_TK: int32 ``[T, K]``, the row of each choice; -1 is none.
    """

    rows: Rows
    groups: Groups
    row_of_TK: torch.Tensor


def permute(
    programs: Programs,
    hidden_TH: torch.Tensor,
    topk_ids_TK: torch.Tensor,
    num_local_experts: int,
    alignment: int,
    scale_format: ScaleFormat | None,
    capacity: int | None = None,
) -> Permuted:
    """Give each choice of a local expert a row, and quantise it on the way if asked to.

    Nothing waits for the device. A token that names an expert twice gets two rows.

    Args:
        programs: what runs the programs.
        hidden_TH: bfloat16 or float32 ``[T, H]``.
        topk_ids_TK: int32 or int64 ``[T, K]``, local experts; any id that is none of them is none.
        num_local_experts: E.
        alignment: every group begins at a multiple of it.
        scale_format: of rows that are quantised, bit for bit as ``mortise.formats.fp8``; None
            moves them as they are.
        capacity: makes rows masked: each group has a slot of so many rows, which no expert's may
            exceed.
    """
    hidden_TH = hidden_TH if hidden_TH.stride(-1) == 1 else hidden_TH.contiguous()
    topk_ids_TK = topk_ids_TK.contiguous()
    (num_tokens, width), num_choices = hidden_TH.shape, topk_ids_TK.shape[1]
    device = hidden_TH.device
    if capacity is None:
        num_rows = most_rows(topk_ids_TK.numel(), num_local_experts, alignment)
    else:
        num_rows = num_local_experts * capacity
    counts, ranks_TK = _rank(programs, topk_ids_TK, num_local_experts)
    # Programs write them, but for no tokens there are none.
    allocate = torch.empty if num_tokens else torch.zeros
    first_rows = allocate(num_local_experts, dtype=torch.int32, device=device)
    row_of_TK = torch.empty_like(ranks_TK)
    quantised = scale_format is not None
    dtype = torch.float8_e4m3fn if quantised else hidden_TH.dtype
    out_RH = undefined((num_rows, width), dtype, device)
    scales = undefined_scales(num_rows, width, device) if quantised else None
    column_groups = _column_groups(width)
    programs.launch(
        permute_program,
        num_tokens * -(-width // (column_groups * GROUP)),
        (
            hidden_TH,
            topk_ids_TK,
            ranks_TK,
            counts,
            first_rows,
            row_of_TK,
            out_RH,
            out_RH if scales is None else scales,
            hidden_TH.stride(0),
            0 if scales is None else scales.stride(1),
        ),
        _permute_constants(
            width, num_choices, num_local_experts, alignment, scale_format, capacity or 0
        ),
        num_warps=NUM_WARPS,
        num_stages=1,
    )
    if not num_tokens and capacity is not None:
        first_rows = torch.arange(num_local_experts, dtype=torch.int32, device=device) * capacity
    groups = Groups(
        first_rows=first_rows,
        counts=counts,
        num_rows=num_rows,
        alignment=alignment,
        capacity=capacity,
    )
    rows = Rows(values=out_RH, kind=kind_of(scale_format), scales=scales)
    return Permuted(rows=rows, groups=groups, row_of_TK=row_of_TK)


def unpermute(
    programs: Programs, rows_RH: torch.Tensor, row_of_TK: torch.Tensor, weights_TK: torch.Tensor
) -> torch.Tensor:
    """Weight and sum the rows of each token in float32, in the order of its choices; round once.

    Args:
        programs: what runs the program.
        rows_RH: bfloat16 or float32 ``[R, H]``.
        row_of_TK: int32 ``[T, K]``, the row of each choice; -1 is none.
        weights_TK: float32 ``[T, K]``.

    Returns:
        ``[T, H]`` of the rows' dtype; zero where a token has no row.
    """
    (num_tokens, num_choices), width = row_of_TK.shape, rows_RH.shape[1]
    out_TH = undefined((num_tokens, width), rows_RH.dtype, rows_RH.device)
    constants = _unpermute_constants(width, num_choices)
    programs.launch(
        unpermute_program,
        num_tokens * -(-width // constants["COLUMNS"]),
        (rows_RH.contiguous(), row_of_TK.contiguous(), weights_TK.contiguous(), out_TH),
        constants,
        num_warps=NUM_WARPS,
        num_stages=1,
    )
    return out_TH


def most_rows(num_choices: int, num_local_experts: int, alignment: int) -> int:
    """Rows that hold whatever experts are chosen, each group padded to the alignment."""
    padded = num_choices + num_local_experts * (alignment - 1)
    return padded // alignment * alignment


def _rank(
    programs: Programs, topk_ids_TK: torch.Tensor, num_local_experts: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The choices of each expert, and which of them each is."""
    num_choices = topk_ids_TK.numel()
    counts = topk_ids_TK.new_empty(num_local_experts, dtype=torch.int32)
    ranks_TK = torch.empty_like(topk_ids_TK, dtype=torch.int32)
    programs.launch(
        rank_program,
        num_local_experts,
        (topk_ids_TK, ranks_TK, counts, num_choices),
        {"BLOCK": RANK_BLOCKS[num_choices > RANK_BLOCKS[0]]},
        num_warps=RANK_WARPS,
        num_stages=1,
    )
    return counts, ranks_TK


def _column_groups(width: int) -> int:
    return min(power_of_two(-(-width // GROUP)), MOST_COLUMN_GROUPS)


def _permute_constants(
    width: int,
    num_choices: int,
    num_groups: int,
    alignment: int,
    scale_format: ScaleFormat | None,
    capacity: int = 0,
) -> Constants:
    return {
        "WIDTH": width,
        "CHOICES": num_choices,
        "CHOICE_BLOCK": power_of_two(num_choices),
        **group_constants(num_groups),
        "ALIGNMENT": alignment,
        "CAPACITY": capacity,
        "QUANTISED": scale_format is not None,
        "POWERS_OF_TWO": scale_format is ScaleFormat.UE8M0,
        "COLUMN_GROUPS": _column_groups(width),
        "COLUMNS": GROUP,
    }


def _unpermute_constants(width: int, num_choices: int) -> dict[str, int]:
    columns = min(power_of_two(width), MOST_COLUMNS)
    return {"WIDTH": width, "CHOICES": num_choices, "COLUMNS": columns}


def _permute_case(width: int, scale_format: ScaleFormat | None, capacity: int = 0) -> CompileCase:
    where = f" in slots of {capacity}" if capacity else ""
    return CompileCase(
        name=f"tokens of {width} columns to {kind_of(scale_format).value} rows{where}",
        source=permute_program,
        signature={
            "hidden": "*bf16",
            "expert_ids": "*i64",
            **dict.fromkeys(("ranks", "counts", "first_rows", "row_of"), "*i32"),
            "out": "*bf16" if scale_format is None else "*fp8e4nv",
            "out_scales": "*bf16" if scale_format is None else "*fp32",
            "row_stride": "i32",
            "out_scale_step": "i32",
        },
        constants=_permute_constants(width, 8, 256, GROUP, scale_format, capacity),
        architectures=tuple(Architecture),
        num_warps=NUM_WARPS,
        num_stages=1,
        divisible_by_16=("hidden", "out", "out_scales", "row_stride"),
    )


def _unpermute_case(width: int) -> CompileCase:
    return CompileCase(
        name=f"rows of {width} columns back to tokens",
        source=unpermute_program,
        signature={"rows": "*bf16", "row_of": "*i32", "weights": "*fp32", "out": "*bf16"},
        constants=_unpermute_constants(width, 8),
        architectures=tuple(Architecture),
        num_warps=NUM_WARPS,
        num_stages=1,
    )


def _rank_case(block: int) -> CompileCase:
    return CompileCase(
        name=f"ranks of choices, {block} together",
        source=rank_program,
        signature={
            "expert_ids": "*i64",
            "ranks": "*i32",
            "counts": "*i32",
            "num_choices": "i32",
        },
        constants={"BLOCK": block},
        architectures=tuple(Architecture),
        num_warps=RANK_WARPS,
        num_stages=1,
    )


CASES: Final = (
    *(_rank_case(block) for block in RANK_BLOCKS),
    *(_permute_case(7168, scale_format) for scale_format in (None, ScaleFormat.FLOAT32)),
    _permute_case(7168, ScaleFormat.UE8M0),
    _permute_case(1000, ScaleFormat.UE8M0),
    _permute_case(7168, ScaleFormat.FLOAT32, 128),
    _unpermute_case(7168),
    _unpermute_case(1000),
)
"""Tokens of DeepSeek-V3 to 256 experts, and rows whose last scale is one of fewer columns."""
