"""What programs that are run at once say when they cannot go on together."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch


class Apart(Exception):  # noqa: N818 - nothing is wrong
    """They go on in several groups, each from its beginning: nothing was written so far.

    Args:
        labels: one for each program; those of one label go on together.
    """

    def __init__(self, labels: Sequence[int]) -> None:
        super().__init__("programs go on in several groups")
        self.labels = labels


def decided(numbers: torch.Tensor) -> int:
    """The one number that all programs have.

    Args:
        numbers: integers or truths ``[P]``.

    Raises:
        Apart: they have several.
    """
    found = numbers.tolist()
    if found.count(found[0]) != len(found):
        raise Apart(found)
    return int(found[0])
