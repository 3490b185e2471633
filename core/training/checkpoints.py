"""Checkpoints of a run: written whole or not at all, so that the same command resumes it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Final

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

CHECKPOINT: Final = "checkpoint.pt"


@dataclass(slots=True)
class Progress:
    """How far a run has come: the stage's number, steps done in it, tokens and seconds in all."""

    stage: int = 0
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0


def save(
    directory: Path,
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    progress: Progress,
    name: str = CHECKPOINT,
) -> None:
    """Write the state of a run to `directory / name`, replacing the file in one move."""
    state = {
        "model": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "progress": asdict(progress),
    }
    temporary = directory / f"{name}.partial"
    torch.save(state, temporary)
    temporary.replace(directory / name)


def load(
    directory: Path,
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    name: str = CHECKPOINT,
) -> Progress:
    """Restore a run from `directory / name`; without such a file it begins anew."""
    file = directory / name
    if not file.exists():
        return Progress()
    state = torch.load(file, weights_only=True)
    model.load_state_dict(state["model"])
    for optimizer, optimizer_state in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(optimizer_state)
    return Progress(**state["progress"])
