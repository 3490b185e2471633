"""Merging the layers of a configuration into one object that knows where each value came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from mortise.config.engine import EngineConfig
from mortise.config.problems import Problem, config_error, problems_in
from mortise.config.table import FrozenTable, thaw

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

Layer = tuple[str, Mapping[str, Any]]
"""A source as a reader would name it (``file engine.toml``), and the tables it gives."""

DEFAULT = "default"


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedConfig:
    """The configuration an engine runs with.

    Args:
        config: the merged values.
        origins: for every dotted key where its value came from: ``default``, ``file engine.toml``,
            ``command line --backend``.
        sources: the places that were merged, the weakest first; ``default`` is none of them.
    """

    config: EngineConfig
    origins: Mapping[str, str]
    sources: tuple[str, ...]

    @classmethod
    def of(cls, config: EngineConfig, source: str = "Python") -> ResolvedConfig:
        """A configuration made in Python: what was given explicitly came from ``source``."""
        given = config.model_dump(exclude_unset=True)
        origins = origins_of(config, [(source, given)])
        return cls(config=config, origins=origins, sources=(source,))


def resolve(layers: Sequence[Layer]) -> ResolvedConfig:
    """Merge layers, the weakest first, over the defaults.

    Tables are merged key by key, every other value replaces the one below it. Nothing that was
    passed in is changed.

    Args:
        layers: pairs of a source and its tables.

    Raises:
        ConfigError: every unknown key and wrong value of every layer, also of those that a
            stronger layer would have hidden.
    """
    problems = [problem for layer in layers for problem in problems_of(layer)]
    if problems:
        raise config_error(problems, EngineConfig)
    merged: dict[str, Any] = {}
    for _, values in layers:
        merged = merge(merged, thaw(values))
    config = EngineConfig.model_validate(merged)
    return ResolvedConfig(
        config=config,
        origins=origins_of(config, layers),
        sources=tuple(source for source, _ in layers),
    )


def problems_of(layer: Layer) -> list[Problem]:
    """What is wrong with one layer by itself; it is complete, since every key has a default."""
    source, values = layer
    try:
        EngineConfig.model_validate(thaw(values))
    except ValidationError as error:
        return problems_in(error, EngineConfig, f"from {source}")
    return []


def merge(weak: Mapping[str, Any], strong: Mapping[str, Any]) -> dict[str, Any]:
    """A new table with the values of both, those of ``strong`` where they meet."""
    merged = dict(weak)
    for key, value in strong.items():
        below = merged.get(key)
        if isinstance(value, Mapping) and isinstance(below, Mapping):
            merged[key] = merge(below, value)
        else:
            merged[key] = value
    return merged


def origins_of(config: EngineConfig, layers: Sequence[Layer]) -> Mapping[str, str]:
    """The source of every value of ``config``, by dotted key."""
    named = {key: source for source, values in layers for key in dotted_keys(values)}
    return FrozenTable({key: named.get(key, DEFAULT) for key in dotted_keys(config.model_dump())})


def dotted_keys(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """The dotted name of every value in nested tables; an empty table counts as a value."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from dotted_keys(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"
