"""Keys of the configuration that are set on the command line: ``--set cache.num_pages=8``."""

from __future__ import annotations

import tomllib
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mortise.config import Layer

FLAG = "--set"


def setting_layers(settings: Sequence[str]) -> list[Layer]:
    """One layer a setting, the last one the strongest.

    Args:
        settings: texts ``KEY=VALUE``; the value is TOML, or a text that needs no quotes.

    Raises:
        click.UsageError: a setting has no key or no value.
    """
    from mortise.config import option_layer

    layers = []
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not (key.strip() and equals and text.strip()):
            raise click.UsageError(
                f"{FLAG} is given {setting!r}, which is no KEY=VALUE such as cache.num_pages=8"
            )
        layers.append(option_layer(f"{FLAG} {key.strip()}", key.strip(), _value(text.strip())))
    return layers


def _value(text: str) -> Any:
    """As TOML reads it: a number, true, a list; whatever it cannot read is a text."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
