"""The exchanges that a run may use, and which of them one step uses."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mortise.errors import ConfigError
from mortise.spec.dispatch import DispatchMode

if TYPE_CHECKING:
    from mortise.config import EngineConfig
    from mortise.parallel.group import ExpertParallelGroup


def dispatch_modes(config: EngineConfig, group: ExpertParallelGroup) -> tuple[DispatchMode, ...]:
    """The modes that every layer of experts must be ready for.

    Raises:
        ConfigError: only the low-latency exchange is wanted, and steps may exceed its capacity.
    """
    dispatch = config.dispatch
    if dispatch.mode == "auto":
        if group.world_size == 1:
            return (DispatchMode.NORMAL,)
        return (DispatchMode.NORMAL, DispatchMode.LOW_LATENCY)
    mode = DispatchMode(dispatch.mode)
    if mode is DispatchMode.LOW_LATENCY:
        _check_capacity(config)
    return (mode,)


def _check_capacity(config: EngineConfig) -> None:
    capacity = config.dispatch.max_tokens_per_rank
    scheduler, rows = config.scheduler, 1 + config.draft.num_tokens
    drafts = f" and draft.num_tokens {rows - 1}, {rows} rows a request" if rows > 1 else ""
    for name, each, also in (("max_num_batched_tokens", 1, ""), ("max_num_seqs", rows, drafts)):
        most = getattr(scheduler, name)
        if most * each > capacity:
            raise ConfigError(
                f"dispatch.mode is 'low_latency', whose capacity is {capacity} tokens a step, and"
                f" scheduler.{name} is {most}{also}",
                expected=f"scheduler.{name} of at most {capacity // each},"
                " from dispatch.max_tokens_per_rank",
                remedy=f"lower scheduler.{name}, raise dispatch.max_tokens_per_rank, or set"
                " dispatch.mode to 'auto', which reads prompts by the normal exchange",
            )


def step_mode(
    modes: tuple[DispatchMode, ...], *, reads_prompts: bool, max_tokens: int, capacity: int
) -> DispatchMode:
    """The exchange of one step; every rank must get the same answer.

    Args:
        modes: of :func:`dispatch_modes`.
        reads_prompts: whether any rank reads a prompt in this step.
        max_tokens: the most tokens that a rank brings to this step.
        capacity: ``dispatch.max_tokens_per_rank``.
    """
    if len(modes) == 1:
        return modes[0]
    if reads_prompts or max_tokens > capacity:
        return DispatchMode.NORMAL
    return DispatchMode.LOW_LATENCY
