"""A read-only table of configuration values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


class FrozenTable(Mapping[str, Any]):
    """A mapping that cannot change: nested tables are frozen as well and lists become tuples.

    It copies what it is given, compares equal to a plain mapping of the same values and, unlike
    ``types.MappingProxyType``, can be copied and pickled.
    """

    __slots__ = ("_values",)

    def __init__(self, values: Mapping[str, Any] | None = None) -> None:
        self._values = {key: freeze(value) for key, value in (values or {}).items()}

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return repr(self._values)


def freeze(value: Any) -> Any:
    """The same value with every mapping in it a ``FrozenTable`` and every list a tuple."""
    if isinstance(value, Mapping):
        return FrozenTable(value)
    if isinstance(value, list | tuple):
        return tuple(map(freeze, value))
    return value


def thaw(value: Any) -> Any:
    """The same value with plain dicts and lists, for printing and for JSON."""
    if isinstance(value, Mapping):
        return {key: thaw(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [thaw(inner) for inner in value]
    return value
