"""The processes that share a model's experts."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Final, Self

import torch.distributed as dist

from mortise.errors import ConfigError, ParallelError, RankLostError
from mortise.parallel.meeting_point import first_sentence, meet, unreachable
from mortise.parallel.time_limit import in_time

if TYPE_CHECKING:
    from types import TracebackType

    from mortise.env import Launch
    from mortise.parallel.meeting_point import MeetingPoint


_LETTING_GO_SECONDS: Final = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertParallelGroup:
    """The ranks of one model; by default this process alone.

    A group that :func:`join` made is closed by ``close`` or by leaving a ``with`` block. Any other
    ``process_group`` remains its owner's.

    Args:
        rank: this process.
        world_size: how many there are.
        process_group: the torch.distributed group of them, which carries tensors of the CPU and
            of the device that the model runs on; None for one process.
        timeout_seconds: how long one waits for another, as ``process_group`` was made.
        meeting_point: where this rank can hear why another ended; None where there is none.
    """

    rank: int = 0
    world_size: int = 1
    process_group: dist.ProcessGroup | None = field(default=None, repr=False, compare=False)
    timeout_seconds: float = 60.0
    meeting_point: MeetingPoint | None = field(default=None, repr=False, compare=False)

    def share(self, num_experts: int) -> range:
        """The experts that live on this rank: the rank-th of equal parts.

        Raises:
            ConfigError: the experts cannot be shared evenly.
        """
        if num_experts % self.world_size:
            raise ConfigError(
                f"{num_experts} experts cannot be shared evenly among {self.world_size} processes",
                expected=f"a number of processes that divides {num_experts}",
                remedy="start another number of processes (torchrun --nproc-per-node)",
            )
        each = num_experts // self.world_size
        return range(self.rank * each, (self.rank + 1) * each)

    def close(self, error: BaseException | None = None) -> None:
        """Leave the group that ``join`` made; closing it again does nothing.

        Connections close when nothing refers to the group any more, at the latest when the
        process ends; until then other ranks wait for this one until their time is over.

        Args:
            error: why this rank leaves while others may still count on it: they are told.
        """
        if self.meeting_point is None or not self._is_open():
            return
        # A rank that lost contact has said so already.
        if error is not None and not isinstance(error, RankLostError):
            self.meeting_point.leave_word(f"{type(error).__name__}: {first_sentence(error)}")
        dist.destroy_process_group(self.process_group)
        # The thread that carried the last exchange lets go of its tensors only now, and needs
        # Python's lock for that: a process that ended meanwhile would be aborted by torch.
        time.sleep(_LETTING_GO_SECONDS)

    def _is_open(self) -> bool:
        return dist.is_initialized() and dist.group.WORLD is self.process_group

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close(error)


def join(
    launch: Launch, backend: str = "gloo", timeout_seconds: float = 60.0
) -> ExpertParallelGroup:
    """Meet the other ranks of a launch and connect to them; no environment variable is read.

    torch.distributed keeps one default group in a process, and this is it, because only that is
    made for every backend by public functions. It is gone when the group is closed, and can then
    be made again.

    Args:
        launch: this process's place, as torchrun says it.
        backend: what carries tensors, as ``torch.distributed.init_process_group`` names it; it
            must carry tensors of the CPU too.
        timeout_seconds: how long one rank waits for another, here and in every collective.

    Raises:
        RankLostError: a rank did not come in time.
        ParallelError: the process has a default group already, or cannot be connected.
    """
    if launch.world_size == 1:
        return ExpertParallelGroup(timeout_seconds=timeout_seconds)
    if dist.is_initialized():
        raise ParallelError(
            "this process has a default group of torch.distributed already",
            remedy="close it first, or make an ExpertParallelGroup of it",
        )
    try:
        # Everything in it has a limit, unless the keeper of the meeting point stops answering.
        return in_time(lambda: _connect(launch, backend, timeout_seconds), 3 * timeout_seconds)
    except TimeoutError:
        raise unreachable(launch, timeout_seconds) from None


def _connect(launch: Launch, backend: str, timeout_seconds: float) -> ExpertParallelGroup:
    meeting_point = meet(launch, timeout_seconds)
    meeting_point.wait_for_all(timeout_seconds)
    try:
        dist.init_process_group(
            backend,
            store=meeting_point.store,
            rank=launch.rank,
            world_size=launch.world_size,
            timeout=timedelta(seconds=timeout_seconds),
        )
    except RuntimeError as error:
        raise RankLostError(
            f"rank {launch.rank} of {launch.world_size} could not be connected to the others",
            details=[*meeting_point.news(), f"cause: {first_sentence(error)}"],
            expected=f"every rank within {timeout_seconds:g} s (parallel.timeout_seconds)",
            remedy="look for the error of the other processes, then start all of them again",
        ) from error
    return ExpertParallelGroup(
        rank=launch.rank,
        world_size=launch.world_size,
        process_group=dist.group.WORLD,
        timeout_seconds=timeout_seconds,
        meeting_point=meeting_point,
    )
