"""The places a configuration comes from: environment, file and command line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mortise.config.toml_file import read_toml
from mortise.env import BF16_DISPATCH_VARIABLE, CONFIG_VARIABLE

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mortise.config.resolve import Layer
    from mortise.env import Environment


def standard_layers(
    environment: Environment,
    config_path: str | Path | None = None,
    options: Iterable[Layer] = (),
) -> list[Layer]:
    """The layers of a command, the weakest first.

    Deprecated variables, then one file - ``config_path`` or else the one that ``MORTISE_CONFIG``
    names -, then the options of the command line.

    Args:
        environment: what ``read_environment`` returned.
        config_path: the file named on the command line.
        options: one ``option_layer`` for each option that was given.

    Raises:
        ConfigError: the file is missing or not TOML.
    """
    layers = environment_layers(environment)
    if config_path is not None:
        layers.append(file_layer(config_path))
    elif environment.config_path is not None:
        layers.append(file_layer(environment.config_path, named_by=CONFIG_VARIABLE))
    return [*layers, *options]


def environment_layers(environment: Environment) -> list[Layer]:
    """What deprecated variables still say.

    ``SGLANG_DEEPEP_BF16_DISPATCH`` was process-wide, so it counts for both roles; false meant
    "as if unset" there and gives no layer here.
    """
    if not environment.bf16_dispatch:
        return []
    values = {"dispatch": {"dtype": "bf16"}, "draft": {"dispatch_dtype": "bf16"}}
    return [(f"environment variable {BF16_DISPATCH_VARIABLE}", values)]


def file_layer(path: str | Path, named_by: str | None = None) -> Layer:
    """The tables of a TOML file.

    Args:
        path: the file.
        named_by: the environment variable that named it, if one did.

    Raises:
        ConfigError: the file is missing or not TOML.
    """
    source = f"file {path}" if named_by is None else f"file {path} named by {named_by}"
    return source, read_toml(Path(path))


def option_layer(flag: str, key: str, value: Any) -> Layer:
    """One option of the command line: ``option_layer("--pages", "cache.num_pages", 8)``."""
    *tables, name = key.split(".")
    values: dict[str, Any] = {name: value}
    for table in reversed(tables):
        values = {table: values}
    return f"command line {flag}", values
