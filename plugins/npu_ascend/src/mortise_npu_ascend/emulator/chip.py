"""Which emulated chip the running operator belongs to."""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from mortise_npu_ascend.emulator.generation import FACTS, ChipFacts, Generation

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True)
class EmulatedChip:
    """One emulated chip: what an operator may depend on besides its arguments.

    Attributes:
        generation: whose tables and limits hold.
        strict: also do what the device does to its users' harm, such as overwriting an input.
    """

    generation: Generation
    strict: bool = False

    @property
    def facts(self) -> ChipFacts:
        """The facts of its generation."""
        return FACTS[self.generation]


# Operators are registered once for a process, by torch's design; which chip they act as is not.
_CURRENT: Final[ContextVar[EmulatedChip]] = ContextVar("mortise_npu_ascend_emulated_chip")


def current_chip() -> EmulatedChip:
    """The chip that the running operator was called for.

    Raises:
        RuntimeError: ``torch.ops.npu`` was called without one.
    """
    chip = _CURRENT.get(None)
    if chip is None:
        raise RuntimeError(
            "an operator of torch.ops.npu was called without an emulated chip; call it through the "
            "object that mortise_npu_ascend.emulator.install() returned, or inside its active()"
        )
    return chip


@contextmanager
def running_on(chip: EmulatedChip) -> Iterator[EmulatedChip]:
    """Let operators called inside the ``with`` block, in this thread or task, act as ``chip``."""
    token = _CURRENT.set(chip)
    try:
        yield chip
    finally:
        _CURRENT.reset(token)
