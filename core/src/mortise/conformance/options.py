"""A backend's own table of the configuration from ``KEY=VALUE`` texts."""

from __future__ import annotations

import tomllib
from typing import TYPE_CHECKING

from mortise.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable


def option_table(texts: Iterable[str]) -> dict[str, object]:
    """Read each value as TOML does, and as plain text where it is no TOML.

    Raises:
        ConfigError: a text without a name or without ``=``.
    """
    table: dict[str, object] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not key.strip() or not equals:
            raise ConfigError(
                f"the option {text!r} has no value",
                expected="KEY=VALUE, for example num_workers=8",
            )
        try:
            table[key.strip()] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            table[key.strip()] = value
    return table
