"""Times calls on a GPU by its own events, with a cold cache, in turns within each round."""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

FLUSHED_BYTES = 512 * 2**20
"""Written before each timed call: more than ten times the largest second-level cache."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Clock:
    """Measures on one device.

    Args:
        device: a GPU; on any other the times are those of the processor and mean nothing.
        rounds: timed calls of each way.
        warm_up: untimed calls before.
    """

    device: torch.device
    rounds: int = 30
    warm_up: int = 3

    def microseconds(self, ways: Mapping[str, Callable[[], object]]) -> dict[str, float]:
        """The median time of each way; the ways take turns, so that a change of clock meets all."""
        for call in ways.values():
            for _ in range(self.warm_up):
                call()
        found: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(self.rounds):
            for name, call in ways.items():
                found[name].append(self._once(call))
        return {name: median(times) for name, times in found.items()}

    def _once(self, call: Callable[[], object]) -> float:
        if self.device.type != "cuda":
            started = time.perf_counter()
            call()
            return (time.perf_counter() - started) * 1e6
        flushed = torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device=self.device)
        flushed.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e3


def copy_bandwidth(clock: Clock, nbytes: int = 2**30) -> float:
    """Bytes a second that a copy within the device reads and writes, both counted.

    Args:
        clock: of the device.
        nbytes: size of what is copied.
    """
    source = torch.empty(nbytes, dtype=torch.uint8, device=clock.device).random_()
    target = torch.empty_like(source)
    taken = clock.microseconds({"copy": lambda: target.copy_(source)})["copy"]
    return 2 * nbytes / (taken * 1e-6)
