"""What ``mortise doctor`` tells a backend, and the findings that come back."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mortise.spec.dispatch import DispatchMode


class Verdict(StrEnum):
    """What a check found, the best first."""

    OK = "ok"
    """All is well."""
    NOTE = "note"
    """Worth knowing; nothing is to be done."""
    WARN = "warn"
    """A run starts, and may go wrong or be slow."""
    FAIL = "fail"
    """Something is broken, and ``mortise doctor`` ends as a failure."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of what ``mortise doctor`` shows.

    Args:
        name: what was looked at, in a word or two.
        verdict: how it is.
        found: what was found.
        remedy: what to do where that is not well.
    """

    name: str
    verdict: Verdict
    found: str
    remedy: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class DoctorRequest:
    """The run that the configuration describes, for the backend that it names.

    Args:
        device, options: as ``Backend.create`` would be given them.
        world_size: processes that would share the experts: those of torchrun, else 1.
        modes: exchanges that passes may use.
        max_tokens: most tokens of one process in a pass.
        max_tokens_per_rank: capacity of the low-latency exchange.
        hidden_size, num_experts, num_experts_per_tok: H, E and K of the model; 0 where it cannot
            be read, which is a finding of its own, and where it has no experts.
    """

    device: str | None
    options: Mapping[str, object] = field(default_factory=dict)
    world_size: int = 1
    modes: tuple[DispatchMode, ...] = ()
    max_tokens: int = 0
    max_tokens_per_rank: int = 0
    hidden_size: int = 0
    num_experts: int = 0
    num_experts_per_tok: int = 0
