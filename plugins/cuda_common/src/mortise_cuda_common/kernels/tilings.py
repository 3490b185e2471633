"""How large the tiles of a grouped product are, chosen by what the host knows without waiting."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from mortise_cuda_common.chip import Architecture

if TYPE_CHECKING:
    from mortise_cuda_common.groups import Groups

Constants = dict[str, int | float | bool]

TILES_ABREAST: Final = 8
"""Tiles of rows side by side: their rows and their expert's weights then share L2."""

MASKED_ROWS: Final = 64
"""Slots of masked rows are sized for the worst case, so more rows than this are not expected."""


FEW_PROGRAMS: Final = 132
"""Fewer leave multiprocessors of an H100 without work; others have about as many."""

CHIPS: Final = (Architecture.SM90, Architecture.SM100)
"""What most cases are compiled for; for the third chip, which is the second's kin, one of each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiling:
    """One way to compile a grouped product.

    Args:
        block_m: rows of a tile.
        block_n: weight rows of a tile.
        weight_first: whether the weight is the first operand of the tensor core: the first is a
            multiple of 64 high, the second of 8 or 16, so that few rows are best second.
        num_warps, num_stages: of a program.
        most_spilled_bytes: bytes that a thread may keep in memory, where registers do not suffice.
    """

    block_m: int
    block_n: int = 128
    weight_first: bool
    num_warps: int
    num_stages: int
    most_spilled_bytes: int = 0


def tiling_of(
    tilings: tuple[Tiling, ...],
    groups: Groups,
    num_columns: int = 0,
    narrow: Tiling | None = None,
) -> Tiling:
    """The smallest that holds the rows of a group in one tile, else the largest.

    Args:
        tilings: from the smallest to the largest.
        groups: of the rows.
        num_columns: of the result.
        narrow: instead of them for few rows, where they would make too few programs.
    """
    rows = rows_of_a_group(groups)
    tiling = next((tiling for tiling in tilings if tiling.block_m >= rows), tilings[-1])
    if narrow is None or rows > narrow.block_m:
        return tiling
    programs = groups.num_groups * -(-num_columns // tiling.block_n)
    return narrow if programs < FEW_PROGRAMS else tiling


def rows_of_a_group(groups: Groups) -> int:
    """Rows that a group is expected to have, at least 1."""
    if groups.capacity is not None:
        return max(1, min(groups.capacity, MASKED_ROWS))
    padding = groups.num_groups * (groups.alignment - 1)
    return max(1, -(-max(groups.num_rows - padding, 0) // groups.num_groups))


def group_constants(num_groups: int) -> Constants:
    """What programs that search for their group are compiled with."""
    return {"NUM_GROUPS": num_groups, "GROUP_BLOCK": power_of_two(num_groups)}


def power_of_two(number: int) -> int:
    """The smallest power of two that is no smaller."""
    return 1 << (number - 1).bit_length()
