"""Where a model wants the tensors of its checkpoint, and which it leaves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TypeAlias

import torch

Read: TypeAlias = Callable[[str], torch.Tensor]
"""Reads a tensor of the checkpoint by name, on the processor and in its stored dtype."""

Conversion: TypeAlias = Callable[[torch.Tensor, Read], torch.Tensor]
"""Makes what the target holds of the stored tensor, and of others that it reads for that.

It checks the values it sees and raises a ``WeightsError`` that names the tensor.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredForm:
    """What a tensor of the checkpoint has to look like where that is not what its target is.

    Args:
        shapes: any of these; the first is the usual one.
        dtypes: any of these.
    """

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Placement:
    """Where one tensor of the checkpoint belongs.

    Args:
        name: its name in the checkpoint.
        target: memory that is filled in place: a parameter or a view of a part of one.
        optional: the model can do without it; the target then keeps what it holds.
        stored: what is expected in the checkpoint; None is the target's shape and a dtype that
            can be converted into the target's.
        convert: makes the target's values of the stored ones; None copies them.
        also: further tensors that ``convert`` reads and that have no placement of their own.
    """

    name: str
    target: torch.Tensor
    optional: bool = False
    stored: StoredForm | None = None
    convert: Conversion | None = None
    also: Mapping[str, StoredForm] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True, slots=True)
class Skip:
    """Tensors that a checkpoint may hold and that the model does not use.

    Args:
        pattern: regular expression that matches the whole name.
        reason: why nothing is lost.
    """

    pattern: str
    reason: str
