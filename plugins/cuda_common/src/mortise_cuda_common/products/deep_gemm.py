"""How DeepGEMM wants groups of rows to lie, whatever they hold."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mortise_cuda_common.kernels.tilings import rows_of_a_group

if TYPE_CHECKING:
    from mortise_cuda_common.groups import Groups
    from mortise_cuda_common.libraries.deep_gemm import DeepGEMM


def row_multiple(deep_gemm: DeepGEMM, groups: Groups) -> int:
    """Rows at a multiple of which each group begins, or each slot ends."""
    if is_dense(groups):
        return 1
    return deep_gemm.alignment() if groups.capacity is None else deep_gemm.slot_multiple()


def is_dense(groups: Groups) -> bool:
    """Whether the host knows that all rows are of one group."""
    return groups.host_counts == (groups.num_rows,) and groups.capacity is None


def expected_rows(groups: Groups) -> int:
    """Rows that an expert is expected to have, by which DeepGEMM chooses its tiles.

    Nothing depends on it but speed.
    """
    if groups.host_counts is None:
        return rows_of_a_group(groups)
    return max(1, -(-sum(groups.host_counts) // groups.num_groups))
