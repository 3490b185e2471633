"""Which rows belong to which expert, as the three kinds of group lists of grouped products say."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


class GroupListKind(IntEnum):
    """``group_list_type`` of a grouped product."""

    CUMULATIVE = 0
    """``[E]``: where the rows of each expert end."""
    COUNTS = 1
    """``[E]``: how many rows each expert has."""
    PAIRS = 2
    """``[E, 2]``: an expert and how many rows it has, experts with rows first."""


@dataclass(frozen=True)
class Group:
    """Consecutive rows ``start`` to ``end``, exclusive, of one expert."""

    expert: int
    start: int
    end: int


def groups_of(values: Sequence[int] | Sequence[Sequence[int]], kind: int) -> tuple[Group, ...]:
    """The groups with rows, in the order of their rows.

    Args:
        values: of the list; pairs for :attr:`GroupListKind.PAIRS`.
        kind: a :class:`GroupListKind`.

    Raises:
        ValueError: a negative count, a cumulative list that decreases, or an expert out of range.
            The device reads outside the tensors instead.
    """
    counts = _experts_and_counts(values, GroupListKind(kind))
    groups, start = [], 0
    for expert, count in counts:
        if count < 0 or not 0 <= expert < len(counts):
            raise ValueError(f"group_list gives expert {expert} of {len(counts)} {count} rows")
        if count:
            groups.append(Group(expert, start, start + count))
        start += count
    return tuple(groups)


def _experts_and_counts(
    values: Sequence[int] | Sequence[Sequence[int]], kind: GroupListKind
) -> list[tuple[int, int]]:
    if kind is GroupListKind.PAIRS:
        return [(expert, count) for expert, count in values]  # type: ignore[misc]
    flat: list[int] = list(values)  # type: ignore[arg-type]
    if kind is GroupListKind.CUMULATIVE:
        flat = [end - start for start, end in zip([0, *flat], flat, strict=False)]
    return list(enumerate(flat))
