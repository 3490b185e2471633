"""How often what was drafted was right."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import zip_longest


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftStatistics:
    """Counts of one request, or of several together; a value, which grows by making a new one.

    Args:
        steps: verify passes of the main model.
        drafted: drafted tokens that were verified.
        accepted_by_place: how often the first, the second, ... draft of a step was accepted; one
            entry for each token that a step may draft. None is larger than the one before it,
            since a draft counts only if all before it were accepted.
    """

    steps: int
    drafted: int
    accepted_by_place: tuple[int, ...]

    @classmethod
    def none(cls, num_tokens: int) -> DraftStatistics:
        """Before anything is drafted, of steps that draft at most ``num_tokens``."""
        return cls(steps=0, drafted=0, accepted_by_place=(0,) * num_tokens)

    def after(self, num_drafted: int, num_accepted: int) -> DraftStatistics:
        """With one more verify pass, which accepted the first ``num_accepted`` of its drafts."""
        assert 0 <= num_accepted <= num_drafted <= len(self.accepted_by_place)
        return DraftStatistics(
            steps=self.steps + 1,
            drafted=self.drafted + num_drafted,
            accepted_by_place=tuple(
                count + (place < num_accepted) for place, count in enumerate(self.accepted_by_place)
            ),
        )

    def __add__(self, other: DraftStatistics) -> DraftStatistics:
        """Of both together, place by place."""
        places = zip_longest(self.accepted_by_place, other.accepted_by_place, fillvalue=0)
        return DraftStatistics(
            steps=self.steps + other.steps,
            drafted=self.drafted + other.drafted,
            accepted_by_place=tuple(mine + theirs for mine, theirs in places),
        )

    @property
    def accepted(self) -> int:
        """Drafted tokens that were accepted."""
        return sum(self.accepted_by_place)

    @property
    def acceptance_rate(self) -> float | None:
        """Accepted among the drafted tokens, 0 to 1; None if nothing was drafted."""
        return self.accepted / self.drafted if self.drafted else None

    @property
    def acceptance_length(self) -> float | None:
        """Tokens that a verify pass gave on average: the accepted drafts and the one after them.

        From 1 to one more than a step may draft; None if there was no verify pass.
        """
        return (self.accepted + self.steps) / self.steps if self.steps else None
