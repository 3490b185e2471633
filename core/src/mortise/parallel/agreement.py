"""What every rank must have in common, compared before anything depends on it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mortise.errors import RankDisagreementError
from mortise.parallel.collectives import all_gather_objects
from mortise.parallel.meeting_point import ranks_in_words

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mortise.parallel.group import ExpertParallelGroup

_ABSENT = "(not set)"


def agree(group: ExpertParallelGroup, facts: Mapping[str, str]) -> None:
    """Compare ``facts`` of all ranks; all ranks call this, and all get the same answer.

    Args:
        group: the ranks.
        facts: what must be the same, under the names that a message should give it.

    Raises:
        RankDisagreementError: on every rank, with each key that differs and each rank's value.
        RankLostError: a rank died, or did not take part in time.
    """
    everyone: list[dict[str, str]] = all_gather_objects(
        group, dict(facts), "the comparison of versions and configurations"
    )
    keys = dict.fromkeys(key for own in everyone for key in own)
    values = {key: [own.get(key, _ABSENT) for own in everyone] for key in keys}
    differing = {key: found for key, found in values.items() if len(set(found)) > 1}
    if differing:
        raise RankDisagreementError(
            f"{group.world_size} processes disagree on {', '.join(differing)}",
            details=[_line(key, found) for key, found in differing.items()],
            expected="the same on every rank",
            remedy="start all processes with the same version, configuration and checkpoint",
        )


def _line(key: str, found: Sequence[str]) -> str:
    """``cache.num_pages: 8 on ranks 0, 1; 16 on rank 2``, the most frequent value first."""
    ranks: dict[str, list[int]] = {}
    for rank, value in enumerate(found):
        ranks.setdefault(value, []).append(rank)
    by_size = sorted(ranks.items(), key=lambda item: -len(item[1]))
    parts = [f"{value} on {ranks_in_words(where)}" for value, where in by_size]
    return f"{key}: {'; '.join(parts)}"
