"""How tiles are chosen: by shapes that the host knows, never by counts on the device."""

from __future__ import annotations

import pytest
import torch

from mortise_cuda_common.groups import Groups
from mortise_cuda_common.kernels.fp8_grouped import NARROW, PRODUCT_TILINGS
from mortise_cuda_common.kernels.tilings import power_of_two, rows_of_a_group, tiling_of


def shapes(
    num_groups: int, num_rows: int, *, alignment: int = 1, capacity: int | None = None
) -> Groups:
    """Groups whose counts nobody can read."""
    nowhere = torch.empty(num_groups, dtype=torch.int32, device="meta")
    return Groups(
        first_rows=nowhere,
        counts=nowhere,
        num_rows=num_rows,
        alignment=alignment,
        capacity=capacity,
    )


@pytest.mark.parametrize(
    ("groups", "rows"),
    [
        (shapes(32, 256), 8),
        (shapes(32, 257), 9),
        (shapes(32, 0), 1),
        # A bound that is padded for the worst case: 32 groups of 128 begin in 8 + 127 rows each.
        (shapes(32, 32 * (8 + 127), alignment=128), 8),
        (shapes(32, 32, alignment=128), 1),
        (shapes(4, 4 * 16, capacity=16), 16),
        (shapes(4, 4 * 1024, capacity=1024), 64),
    ],
)
def test_rows_that_a_group_is_expected_to_have(groups: Groups, rows: int) -> None:
    assert rows_of_a_group(groups) == rows


@pytest.mark.parametrize(
    ("rows", "block_m"), [(1, 16), (16, 16), (17, 32), (33, 64), (65, 128), (4096, 128)]
)
def test_the_smallest_tile_that_holds_a_group(rows: int, block_m: int) -> None:
    tiling = tiling_of(PRODUCT_TILINGS, shapes(32, 32 * rows), 7168, NARROW)
    assert (tiling.block_m, tiling.block_n) == (block_m, 128)


@pytest.mark.parametrize(
    ("num_groups", "rows", "num_columns", "is_narrow"),
    [
        (1, 16, 2112, True),
        (1, 64, 2112, True),
        (1, 65, 2112, False),
        (1, 16, 132 * 128, False),
        (32, 16, 512, True),
        (32, 16, 1024, False),
    ],
)
def test_few_weights_for_few_rows_are_shared_by_more_programs(
    num_groups: int, rows: int, num_columns: int, is_narrow: bool
) -> None:
    groups = shapes(num_groups, num_groups * rows)
    assert (tiling_of(PRODUCT_TILINGS, groups, num_columns, NARROW) is NARROW) == is_narrow


def test_powers_of_two() -> None:
    assert [power_of_two(number) for number in (1, 2, 3, 4, 5, 256, 257)] == [
        1, 2, 4, 4, 8, 256, 512,
    ]  # fmt: skip
