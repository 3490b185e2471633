"""Which model of a run a decision belongs to, and which kind of forward pass is being made."""

from __future__ import annotations

from enum import StrEnum
from typing import assert_never


class ModelRole(StrEnum):
    """A run binds a backend once per role; nothing is shared between roles."""

    MAIN = "main"
    """The model whose text is generated."""
    DRAFT = "draft"
    """The model that guesses tokens for the main one to verify."""


class ForwardMode(StrEnum):
    """The kind of one forward pass; every consumer handles every member."""

    PREFILL = "prefill"
    """Prompt chunks of any length, possibly of several requests."""
    DECODE = "decode"
    """One new token per request."""
    IDLE = "idle"
    """No request on this rank; it still takes part in every collective."""
    TARGET_VERIFY = "target_verify"
    """A fixed number of drafted tokens per request, checked by the main model."""
    DRAFT_EXTEND = "draft_extend"
    """A fixed number of accepted tokens per request, read by the draft model."""

    @property
    def needs_schedule(self) -> bool:
        """Whether a kernel over paged keys must be given a schedule planned beforehand."""
        match self:
            case ForwardMode.PREFILL:
                return False
            case (
                ForwardMode.DECODE
                | ForwardMode.IDLE
                | ForwardMode.TARGET_VERIFY
                | ForwardMode.DRAFT_EXTEND
            ):
                return True
            case _:
                assert_never(self)


class Phase(StrEnum):
    """When a hook runs, which is also how often it may cost something."""

    POLICY = "policy"
    """While a model is built; returns plain, printable data."""
    LAYOUT = "layout"
    """While a model is built, after its weights are loaded."""
    STEP = "step"
    """Once per forward pass."""
    KERNEL = "kernel"
    """Once per layer and forward pass."""
