"""Which calls of a run are kept: of some passes, of some layers, up to a size."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from mortise.errors import RecordingError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

DEFAULT_MAX_BYTES: Final = 1 << 30

_UNITS: Final[Mapping[str, int]] = MappingProxyType(
    {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
    | {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}
)
_EXPECTED: Final = "every:N, first:N or layers:PATTERN,PATTERN..."


@dataclass(frozen=True, slots=True)
class Sampling:
    """What to keep; nothing said keeps everything.

    Args:
        every: one pass in so many, beginning with the first.
        first: the first passes alone.
        layers: patterns of dotted names, as in a shell; empty is every layer.
    """

    every: int = 1
    first: int | None = None
    layers: tuple[str, ...] = ()

    @classmethod
    def parse(cls, texts: Sequence[str]) -> Sampling:
        """From ``every:4``, ``first:2``, ``layers:*.mlp,*.self_attn``; all that are given hold.

        Raises:
            RecordingError: a text says something else.
        """
        every, first, layers = 1, None, []
        for text in texts:
            kind, _, value = text.partition(":")
            match kind:
                case "every":
                    every = _positive(text, value)
                case "first":
                    first = _positive(text, value)
                case "layers" if value:
                    layers += value.split(",")
                case _:
                    raise _unknown(text)
        return cls(every, first, tuple(layers))

    def has_pass(self, number: int) -> bool:
        """Whether a pass is kept; 0, the loading, always is."""
        if number == 0:
            return True
        return (number - 1) % self.every == 0 and (self.first is None or number <= self.first)

    def has_layer(self, layer: str) -> bool:
        """Whether a layer is kept; a call of no layer always is."""
        if not self.layers or not layer:
            return True
        return any(fnmatchcase(layer, pattern) for pattern in self.layers)

    def __str__(self) -> str:
        said = [f"every:{self.every}"] if self.every > 1 else []
        said += [] if self.first is None else [f"first:{self.first}"]
        said += [f"layers:{','.join(self.layers)}"] if self.layers else []
        return " ".join(said) or "everything"


def bytes_of(text: str) -> int:
    """``1500``, ``64MB``, ``2 GiB`` as a number of bytes.

    Raises:
        RecordingError: it is none.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = None if found is None else _UNITS.get(found[2].upper())
    if found is None or unit is None or float(found[1]) <= 0:
        raise RecordingError(
            f"a size of {text!r}",
            expected="a positive number of bytes such as 1500, 64MB or 2GiB",
            remedy="correct --max-bytes",
        )
    return int(float(found[1]) * unit)


def _positive(text: str, value: str) -> int:
    if not value.isdecimal() or int(value) < 1:
        raise _unknown(text)
    return int(value)


def _unknown(text: str) -> RecordingError:
    return RecordingError(f"a sample of {text!r}", expected=_EXPECTED, remedy="correct --sample")
