"""The number of threads of one operation, for as long as a model runs."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

import torch

from mortise.backends import Decision
from mortise.spec.roles import ModelRole

if TYPE_CHECKING:
    from collections.abc import Iterator

SMALL_MODEL_BYTES: Final = 64 * 2**20
"""Weights up to here stay in the processor's caches; an operation then ends before more threads
than one have met, and beside other busy processes they wait for each other far longer."""


def decide_threads(
    asked: int | None, source: str, weight_bytes: int
) -> tuple[int | None, Decision]:
    """What the user asked for, else one thread for a small model, else torch's choice (None)."""
    if asked is not None:
        threads, rule, reason = asked, "configuration", "threads is set"
    elif weight_bytes <= SMALL_MODEL_BYTES:
        megabytes = weight_bytes / 2**20
        threads, rule = 1, "model size"
        reason = f"{megabytes:.0f} MiB of weights are too few to share an operation"
    else:
        threads, rule, reason = None, "default", "torch's choice"
    return threads, Decision(
        role=ModelRole.MAIN,
        subject="threads",
        value=str(torch.get_num_threads() if threads is None else threads),
        rule=rule,
        reason=reason,
        source=source,
    )


@contextmanager
def num_threads(count: int | None) -> Iterator[None]:
    """Let torch use ``count`` threads inside, and what it used before afterwards.

    torch keeps the number for the whole process; giving it back keeps two engines apart.
    """
    before = torch.get_num_threads()
    if count is None or count == before:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
