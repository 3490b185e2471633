"""One call that the vendor's shape function judges."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True)
class Case:
    """One call of an emulated operator.

    Attributes:
        operator: with its overload, if it has one.
        says: what is special about the call.
        args: positional arguments.
        kwargs: the others.
        generation: of the emulated chip.
        strict: whether the chip also does what harms its users.
        tiled: whether weights count as stored in tiles; torch checks copies, which lose the tag.
        differs: how the call differs from what the vendor says of it, in the words of
            ``docs/reference/ascend-emulator.md``; None if they must not.
        found: what torch says of such a difference.
    """

    operator: str
    says: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    generation: str = "A2"
    strict: bool = False
    tiled: bool = False
    differs: str | None = None
    found: str = "mismatched tensor metadata"
