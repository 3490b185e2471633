"""Checkpoints of a run: written whole or not at all, so that the same command resumes it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import Tensor, nn

CHECKPOINT: Final = "checkpoint.pt"


@dataclass(slots=True)
class Progress:
    """How far a run has come: the stage's number, steps done in it, tokens and seconds in all."""

    stage: int = 0
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0


def save(
    file: Path,
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    progress: Progress,
) -> None:
    """Write the state of a run to `file`, replacing it in one move.

    Optimizer states are kept by parameter name: the next stage may train other parameters.
    """
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    states = {
        names[parameter]: state
        for optimizer in optimizers
        for parameter, state in optimizer.state.items()
    }
    temporary = file.with_suffix(".partial")
    torch.save(
        {"model": model.state_dict(), "optimizer": states, "progress": asdict(progress)}, temporary
    )
    temporary.replace(file)


def read(file: Path) -> dict[str, Any]:
    """Return what `save` wrote."""
    state: dict[str, Any] = torch.load(file, weights_only=True)
    return state


def restore(
    state: dict[str, Any], model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]
) -> None:
    """Fill model and optimizers from a saved state; only indexers may be missing from it."""
    missing, unexpected = model.load_state_dict(state["model"], strict=False)
    assert not unexpected, unexpected
    assert all(".indexer." in name for name in missing), missing
    for name, parameter in model.named_parameters():
        if name in state["optimizer"]:
            _owner(parameter, optimizers).state[parameter] = state["optimizer"][name]


def _owner(
    parameter: nn.Parameter, optimizers: Sequence[torch.optim.Optimizer]
) -> torch.optim.Optimizer:
    for optimizer in optimizers:
        if any(parameter is own for group in optimizer.param_groups for own in group["params"]):
            return optimizer
    raise AssertionError("a parameter belongs to no optimizer")
