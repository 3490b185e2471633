"""Where ranks meet before they are connected, and where they leave word when they end early."""

from __future__ import annotations

import json
import re
import socket
import time
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Final

import torch.distributed as dist

from mortise.errors import ParallelError, RankLostError
from mortise.parallel.time_limit import in_time

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mortise.env import Launch

LISTENING_SECONDS: Final = 1.0
"""How long a rank that lost contact listens for the others' last words."""

HOST_LISTENING_SECONDS: Final = 2.0
"""The same for the rank at which the others meet: once it has left, they can hear nobody."""

NEWS_SECONDS: Final = 4.0
"""Most that a rank that lost contact spends on finding out why."""

_PAUSE_SECONDS: Final = 0.02
_DYING_SECONDS: Final = 0.1
_GAVE_UP: Final = "gave up"


@dataclass(frozen=True, slots=True)
class LastWords:
    """What was heard of the other ranks.

    Args:
        ended: ranks that ended by an error of their own, and what it said.
        cut_off: ranks that lost contact as well.
        silent: ranks that said nothing: they died, or are still busy.
        is_gone: the meeting point is gone, so silence proves nothing.
    """

    ended: dict[int, str]
    cut_off: tuple[int, ...]
    silent: tuple[int, ...]
    is_gone: bool = False


@dataclass(frozen=True, slots=True)
class MeetingPoint:
    """A store of keys and values that every rank reaches; torchrun keeps it, or else rank 0.

    Args:
        launch: this rank, and where the store is.
        store: connected; its keys belong to this meeting alone.
    """

    launch: Launch
    store: dist.PrefixStore = field(repr=False)  # type: ignore[name-defined]

    @property
    def is_host(self) -> bool:
        """Whether the others lose the meeting point when this process ends."""
        return self.launch.rank == 0 and not self.launch.agent_store

    def wait_for_all(self, timeout_seconds: float) -> None:
        """Say that this rank is here, and wait for the others.

        Raises:
            RankLostError: some did not come in time, which is then the same error on every rank
                that did; or the meeting point is gone.
        """
        arrivals = [f"rank {rank} is here" for rank in range(self.launch.world_size)]
        try:
            self.store.set(arrivals[self.launch.rank], "")
            for _ in _until(timeout_seconds):
                if self._has(*arrivals):
                    return
                if self._has(_GAVE_UP):
                    break
            missing = self._give_up(arrivals)
        except dist.DistError as error:
            raise unreachable(self.launch, timeout_seconds) from error
        raise RankLostError(
            f"{ranks_in_words(missing)} of {self.launch.world_size} did not come to"
            f" {address_of(self.launch)}",
            expected=f"every rank within {timeout_seconds:g} s (parallel.timeout_seconds)",
            remedy="look for the error of the missing processes, then start all of them again",
        )

    def _give_up(self, arrivals: Sequence[str]) -> list[int]:
        """Which ranks are missing; the first rank that gives up decides it for all."""
        if not self._has(_GAVE_UP):
            missing = [rank for rank, arrival in enumerate(arrivals) if not self._has(arrival)]
            self.store.set(_GAVE_UP, json.dumps(missing))
        if self.is_host:
            time.sleep(LISTENING_SECONDS)
        decided: list[int] = json.loads(self.store.get(_GAVE_UP))
        return decided

    def leave_word(self, reason: str | None) -> None:
        """Say that this rank ends for ``reason``; None is that it lost contact itself."""
        try:
            if is_listening(self.launch):
                self.store.set(_last_word_of(self.launch.rank), json.dumps(reason))
        except dist.DistError:
            # Nobody is left to be told.
            return

    def hear(self) -> LastWords:
        """Wait for the last words of all other ranks, 1 second, or 2 where this rank is host."""
        pending = [rank for rank in range(self.launch.world_size) if rank != self.launch.rank]
        ended: dict[int, str] = {}
        cut_off: list[int] = []
        is_gone = not is_listening(self.launch)
        try:
            for _ in _until(HOST_LISTENING_SECONDS if self.is_host else LISTENING_SECONDS):
                if is_gone or not pending:
                    break
                for rank in [rank for rank in pending if self._has(_last_word_of(rank))]:
                    pending.remove(rank)
                    reason = json.loads(self.store.get(_last_word_of(rank)))
                    if reason is None:
                        cut_off.append(rank)
                    else:
                        ended[rank] = reason
        except dist.DistError:
            is_gone = True
        return LastWords(ended, tuple(cut_off), tuple(pending), is_gone)

    def news(self) -> list[str]:
        """Say that this rank lost contact; returns what is known of the others, in lines."""
        # A process that dies closes its connections one by one; the meeting point may be the last.
        time.sleep(_DYING_SECONDS)
        try:
            return in_time(self._exchange_news, NEWS_SECONDS)
        except TimeoutError:
            return [f"{self._keeper} does not answer"]

    def _exchange_news(self) -> list[str]:
        self.leave_word(None)
        heard = self.hear()
        lines = [f"rank {rank} ended with {why}" for rank, why in sorted(heard.ended.items())]
        if heard.is_gone:
            return [*lines, f"{self._keeper} is gone, where the others could leave word"]
        if heard.silent:
            lines.append(f"no sign of life from {ranks_in_words(heard.silent)}")
        if heard.cut_off:
            lines.append(f"{ranks_in_words(sorted(heard.cut_off))} lost contact too")
        return lines

    @property
    def _keeper(self) -> str:
        return keeper_of(self.launch)

    def _has(self, *keys: str) -> bool:
        return bool(self.store.check(list(keys)))


def meet(launch: Launch, timeout_seconds: float) -> MeetingPoint:
    """Reach the meeting point, or open it where this rank keeps it.

    Raises:
        RankLostError: nobody opened it in time.
        ParallelError: this rank cannot open it.
    """
    is_host = launch.rank == 0 and not launch.agent_store
    if not is_host:
        _wait_until_listening(launch, timeout_seconds)
    try:
        store = dist.TCPStore(  # type: ignore[attr-defined]
            launch.master_addr,
            launch.master_port,
            launch.world_size,
            is_master=is_host,
            timeout=timedelta(seconds=timeout_seconds),
            wait_for_workers=False,
            # A second meeting in the same processes shares the port of the first.
            multi_tenant=True,
        )
        # What the first meeting left there must not be taken for news of the second.
        meeting = store.add(f"meetings of rank {launch.rank}", 1)
        own = dist.PrefixStore(  # type: ignore[attr-defined]
            f"meeting {meeting}", store
        )
    except dist.DistError as error:
        if not is_host:
            raise unreachable(launch, timeout_seconds) from error
        raise ParallelError(
            f"rank 0 cannot listen at {address_of(launch)}",
            details=[f"cause: {first_sentence(error)}"],
            remedy="choose another port (torchrun --master-port), or end the process that has it",
        ) from error
    return MeetingPoint(launch, own)


def _wait_until_listening(launch: Launch, timeout_seconds: float) -> None:
    """Wait for the host; a client of the store would write a trace for every attempt."""
    for _ in _until(timeout_seconds):
        if is_listening(launch):
            return
    raise unreachable(launch, timeout_seconds)


def is_listening(launch: Launch) -> bool:
    """Whether a connection to the meeting point can be made."""
    address = (launch.master_addr, launch.master_port)
    try:
        with socket.create_connection(address, timeout=LISTENING_SECONDS):
            return True
    except OSError:
        return False


def unreachable(launch: Launch, timeout_seconds: float) -> RankLostError:
    """The error of a rank that cannot reach the meeting point, or not any more."""
    keeper = keeper_of(launch)
    return RankLostError(
        f"rank {launch.rank} of {launch.world_size} cannot reach {keeper} at {address_of(launch)}",
        expected=f"{keeper} to answer there within {timeout_seconds:g} s"
        " (parallel.timeout_seconds)",
        remedy=f"look for the error of {keeper}, and check the address that torchrun was given",
    )


def keeper_of(launch: Launch) -> str:
    """Whose process the meeting point lives in."""
    return "torchrun" if launch.agent_store else "rank 0"


def address_of(launch: Launch) -> str:
    """``host:port`` of the meeting point."""
    return f"{launch.master_addr}:{launch.master_port}"


def ranks_in_words(ranks: Sequence[int]) -> str:
    """``rank 2`` or ``ranks 1, 2``."""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def first_sentence(error: BaseException) -> str:
    """What an error says first; those of torch go on with advice and traces of their own."""
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    # The place in a source of torch where it was raised.
    return re.sub(r"\[\S+:\d+\] ", "", lines[0]).partition(". ")[0]


def _last_word_of(rank: int) -> str:
    return f"last word of rank {rank}"


def _until(timeout_seconds: float) -> Iterator[None]:
    """Yield at once and then at short intervals until the time is over."""
    deadline = time.monotonic() + timeout_seconds
    yield
    while time.monotonic() < deadline:
        time.sleep(_PAUSE_SECONDS)
        yield
