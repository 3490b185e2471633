"""Programs of one launch that are run at once for as long as they take the same way."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from mortise_cuda_common.programs.apart import Apart

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

MOST_AT_ONCE: Final = 512
"""Programs that begin together."""
MOST_PARTINGS: Final = 8
"""Groups that part more often go on one by one, for each starts from its beginning."""


class Writes:
    """What programs that run at once write; memory gets it when all of them have ended.

    So none of them sees what another one writes; where one reads what any of them writes, they are
    run one by one.

    Args:
        programs: how many there are.
    """

    __slots__ = ("_pending", "_programs", "_read", "_written")

    def __init__(self, programs: int) -> None:
        self._programs = programs
        self._pending: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self._read: dict[int, int] = {}
        self._written: dict[int, int] = {}

    def note_read(self, memory: torch.Tensor) -> None:
        """Numbers of some memory are about to be read."""
        self._note(memory, self._read, self._written)

    def add(self, memory: torch.Tensor, offsets: torch.Tensor, raw: torch.Tensor) -> None:
        """Have numbers ``raw`` written to ``offsets`` of some memory, both ``[N]``."""
        self._note(memory, self._written, self._read)
        self._pending.append((memory, offsets, raw))

    def alone(self) -> Apart:
        """What is raised where each program must run by itself."""
        return Apart(range(self._programs))

    def commit(self) -> None:
        """Write it."""
        for memory, offsets, raw in self._pending:
            memory.index_copy_(0, offsets, raw)

    def _note(self, memory: torch.Tensor, here: dict[int, int], there: dict[int, int]) -> None:
        first = memory.data_ptr()
        last = first + memory.nbytes
        if here.get(first, 0) >= last:
            return
        here[first] = last
        if any(begin < last and first < end for begin, end in there.items()):
            raise self.alone()


def run_together(run: Callable[[Sequence[int]], None], places: range) -> None:
    """Run programs at once where they take the same way, else in groups that do.

    Args:
        run: runs the programs at some places at once, and writes nothing unless all of them end; of
            one it is what it means.
        places: of all programs.
    """
    waiting: list[tuple[Sequence[int], int]] = [
        (places[first : first + MOST_AT_ONCE], 0) for first in range(0, len(places), MOST_AT_ONCE)
    ]
    waiting.reverse()
    while waiting:
        group, partings = waiting.pop()
        parts = _tried(run, group, partings)
        waiting.extend((part, partings + 1) for part in reversed(parts))


def _tried(
    run: Callable[[Sequence[int]], None], group: Sequence[int], partings: int
) -> list[Sequence[int]]:
    """Run a group; what is left of it to run in parts."""
    if len(group) == 1:
        run(group)
        return []
    alone = [group[place : place + 1] for place in range(len(group))]
    if partings > MOST_PARTINGS:
        return alone
    try:
        run(group)
    except Apart as apart:
        return _parts(group, apart.labels)
    except Exception:
        # What goes wrong is told of one program by itself.
        return alone
    return []


def _parts(group: Sequence[int], labels: Sequence[int]) -> list[Sequence[int]]:
    parts: dict[Any, list[int]] = {}
    for place, label in zip(group, labels, strict=True):
        parts.setdefault(label, []).append(place)
    return list(parts.values())
