"""How many programs split how many tokens at a time, within what the device takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from mortise.plugin import QKVShape

MOST_PROGRAMS: Final = 65535
"""Largest product of a launch's grid on this device; one more is an error of its launcher."""

MOST_OFFSET: Final = 2**31
"""Offsets within one launch are 32-bit numbers: 64-bit ones are slow here."""

MOST_BLOCK: Final = 2**13
"""Numbers in one block: 32 KiB of float32, of the 192 KiB of the unified buffer."""

MOST_TOKENS: Final = 32
"""Tokens in one block."""


@dataclass(frozen=True)
class Launch:
    """One launch: ``num_tokens`` tokens from ``first_token`` on, by ``programs`` programs."""

    first_token: int
    num_tokens: int
    programs: int


@dataclass(frozen=True)
class SplitPlan:
    """Every launch of one split.

    A task is one block of tokens for one key head. A launch starts at most as many programs as the
    device has cores, and each takes every so-manieth task, so that the grid does not grow with the
    tokens or with the heads.

    Args:
        block_tokens: tokens of a block.
        key_block, value_block, head_block: columns of a block of keys, of values, and of numbers
            that each value head has one of: powers of two.
        launches: one after the other; none for no token.
    """

    block_tokens: int
    key_block: int
    value_block: int
    head_block: int
    launches: tuple[Launch, ...]


def split_plan(num_tokens: int, shape: QKVShape, row_stride: int, num_cores: int) -> SplitPlan:
    """Plan the split of ``num_tokens`` tokens; any number of them, none included.

    Args:
        num_tokens: T.
        shape: heads and head sizes that :func:`fits`.
        row_stride: numbers from one token to the next, in the longest tensor.
        num_cores: cores of the device that run such programs.
    """
    ratio = shape.num_value_heads // shape.num_key_heads
    key_block = power_of_two(shape.key_head_dim)
    value_block = power_of_two(ratio * shape.value_head_dim)
    block_tokens = min(MOST_TOKENS, max(1, MOST_BLOCK // max(key_block, value_block)))
    # A block may begin inside and reach beyond the last token: its offsets count too.
    most_tokens = (MOST_OFFSET // row_stride - 1) // block_tokens * block_tokens
    launches = []
    for first in range(0, num_tokens, most_tokens):
        tokens = min(most_tokens, num_tokens - first)
        tasks = -(-tokens // block_tokens) * shape.num_key_heads
        launches.append(Launch(first, tokens, min(num_cores, tasks, MOST_PROGRAMS)))
    return SplitPlan(
        block_tokens=block_tokens,
        key_block=key_block,
        value_block=value_block,
        head_block=power_of_two(ratio),
        launches=tuple(launches),
    )


def fits(shape: QKVShape) -> bool:
    """Whether one token of one key head is no more than a block."""
    ratio = shape.num_value_heads // shape.num_key_heads
    widest = max(shape.key_head_dim, ratio * shape.value_head_dim)
    return power_of_two(widest) <= MOST_BLOCK


def power_of_two(number: int) -> int:
    """The smallest power of two that is not less."""
    return 1 << (number - 1).bit_length()
