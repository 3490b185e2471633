"""Where a model wants the tensors of its checkpoint, and which it leaves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, eq=False)
class Placement:
    """Where one tensor of the checkpoint belongs.

    Args:
        name: its name in the checkpoint.
        target: memory that is filled in place: a parameter or a view of a part of one; its shape
            is the shape expected in the checkpoint.
        optional: the model can do without it; the target then keeps what it holds.
    """

    name: str
    target: torch.Tensor
    optional: bool = False


@dataclass(frozen=True, slots=True)
class Skip:
    """Tensors that a checkpoint may hold and that the model does not use.

    Args:
        pattern: regular expression that matches the whole name.
        reason: why nothing is lost.
    """

    pattern: str
    reason: str
