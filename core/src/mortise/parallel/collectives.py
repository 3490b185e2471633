"""What ranks exchange, all of it by one primitive: every rank sends rows to every rank."""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from mortise.errors import RankLostError
from mortise.parallel.meeting_point import first_sentence

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mortise.parallel.group import ExpertParallelGroup


@dataclass(frozen=True, slots=True)
class Exchange:
    """An exchange of rows that may still be under way.

    Args:
        group: the ranks.
        doing: what it is for, in errors.
        sent, received: the rows; ``received`` is undefined until ``wait`` has returned.
    """

    group: ExpertParallelGroup
    doing: str
    sent: torch.Tensor = field(repr=False)
    received: torch.Tensor = field(repr=False)
    _work: dist.Work | None = field(repr=False)

    def wait(self) -> torch.Tensor:
        """Wait for the rows of every rank; they lie in the order of the ranks.

        Raises:
            RankLostError: a rank died, or did not take part in time.
        """
        if self._work is not None:
            with watching(self.group, self.doing):
                self._work.wait()
        return self.received


def start_exchange(
    group: ExpertParallelGroup,
    doing: str,
    rows: torch.Tensor,
    send_counts: Sequence[int] | None = None,
    receive_counts: Sequence[int] | None = None,
) -> Exchange:
    """Send every rank its part of ``rows``, in the order of the ranks; all ranks call this.

    As everybody is connected to everybody, each rank notices at once when one is gone. In a ring
    or a tree only its neighbours would, and all others when those give up.

    Args:
        group: the ranks.
        doing: what the exchange is for, in errors (``the counts of layer 3``).
        rows: ``[S, ...]`` of a dtype that can be sent: no one-byte float.
        send_counts: rows for each rank; None is equal parts.
        receive_counts: rows from each rank; None is equal parts, as many as are sent.

    Raises:
        RankLostError: a rank is known to be gone.
    """
    if group.process_group is None:
        return Exchange(group, doing, rows, rows, None)
    rows = rows.contiguous()
    num_received = rows.shape[0] if receive_counts is None else sum(receive_counts)
    received = rows.new_empty(num_received, *rows.shape[1:])
    with watching(group, doing):
        work = dist.all_to_all_single(
            received,
            rows,
            None if receive_counts is None else list(receive_counts),
            None if send_counts is None else list(send_counts),
            group=group.process_group,
            async_op=True,
        )
    return Exchange(group, doing, rows, received, work)


def exchange_counts(group: ExpertParallelGroup, doing: str, counts: torch.Tensor) -> torch.Tensor:
    """Tell every rank its number: int64 ``[G]`` for each rank becomes ``[G]`` from each.

    Raises:
        RankLostError: a rank died, or did not take part in time.
    """
    return start_exchange(group, doing, counts).wait()


def all_gather_integers(
    group: ExpertParallelGroup, own: Sequence[int], doing: str = "an agreement on numbers"
) -> list[tuple[int, ...]]:
    """The numbers of every rank, in the order of the ranks; all bring equally many.

    Raises:
        RankLostError: a rank died, or did not take part in time.
    """
    rows = torch.tensor([own], dtype=torch.int64).expand(group.world_size, -1)
    return [tuple(row) for row in start_exchange(group, doing, rows).wait().tolist()]


def all_reduce_max_float(
    group: ExpertParallelGroup, own: float, doing: str = "an agreement on a largest number"
) -> float:
    """The largest number that any rank brings, of double precision.

    Raises:
        RankLostError: a rank died, or did not take part in time.
    """
    rows = torch.full((group.world_size, 1), own, dtype=torch.float64)
    return float(start_exchange(group, doing, rows).wait().max())


def all_gather_objects(
    group: ExpertParallelGroup, own: object, doing: str = "an exchange of records"
) -> list[Any]:
    """The values of every rank, in the order of the ranks, as JSON gives them back.

    Args:
        group: the ranks.
        own: anything that ``json.dumps`` takes; tuples come back as lists.
        doing: what it is for, in errors.

    Raises:
        RankLostError: a rank died, or did not take part in time.
    """
    text = json.dumps(own).encode()
    lengths = [length for (length,) in all_gather_integers(group, [len(text)], doing)]
    copies = torch.frombuffer(bytearray(text), dtype=torch.uint8).repeat(group.world_size)
    send_counts = [len(text)] * group.world_size
    received = start_exchange(group, doing, copies, send_counts, lengths).wait()
    return [json.loads(part.numpy().tobytes()) for part in received.split(lengths)]


def from_first(
    group: ExpertParallelGroup, own: object, doing: str = "what the first process knows"
) -> Any:
    """The value of rank 0, as JSON gives it back; what others bring is not looked at.

    Raises:
        RankLostError: a rank died, or did not take part in time.
    """
    return all_gather_objects(group, own if group.rank == 0 else None, doing)[0]


@contextmanager
def watching(group: ExpertParallelGroup, doing: str) -> Iterator[None]:
    """Turn what torch raises when a rank is gone into the error that says so.

    Raises:
        RankLostError: with what the other ranks said last.
    """
    try:
        yield
    except RuntimeError as error:
        raise _contact_lost(group, doing, error) from error


def _contact_lost(group: ExpertParallelGroup, doing: str, error: RuntimeError) -> RankLostError:
    news = [] if group.meeting_point is None else group.meeting_point.news()
    return RankLostError(
        f"rank {group.rank} of {group.world_size} lost contact during {doing}",
        details=[*news, f"cause: {first_sentence(error)}"],
        expected=f"an answer of every rank within {group.timeout_seconds:g} s"
        " (parallel.timeout_seconds)",
        remedy="look for the first error of the other processes, then start all of them again; if"
        " one was only slow, raise parallel.timeout_seconds",
    )
