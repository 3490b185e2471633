"""The public surface as text: names, commands with their options, configuration keys.

Run as a program it prints the text that ``public_api.txt`` holds.
"""

from __future__ import annotations

import re
from importlib import import_module
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

MODULES = ("mortise", "mortise.plugin")


def exported_names() -> Iterator[str]:
    for module in MODULES:
        yield from (f"{module}.{name}" for name in sorted(import_module(module).__all__))


def commands(command: click.Command, name: str = "mortise") -> Iterator[str]:
    """Every command of the tree with its parameters, in alphabetical order."""
    yield " ".join([name, *sorted(arguments_of(command))])
    yield from (f"{name} {option}" for option in sorted(options_of(command)))
    if isinstance(command, click.Group):
        for child in sorted(command.commands):
            yield from commands(command.commands[child], f"{name} {child}")


def arguments_of(command: click.Command) -> Iterator[str]:
    for parameter in command.params:
        if isinstance(parameter, click.Argument):
            name = parameter.make_metavar(click.Context(command))
            yield name if parameter.required else f"[{name.strip('[]')}]"


def options_of(command: click.Command) -> Iterator[str]:
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            spelt = [*parameter.opts, *parameter.secondary_opts]
            value = "" if parameter.is_flag else f" {kind_of(parameter.type)}"
            yield "/".join(sorted(spelt, key=len, reverse=True)) + value


def kind_of(kind: click.ParamType) -> str:
    if isinstance(kind, click.Choice):
        return "|".join(map(str, kind.choices))
    return kind.name.upper()


def configuration_keys() -> Iterator[str]:
    from mortise.config.describe import config_rows

    for row in config_rows():
        kind = re.sub(r"\s+", " ", row.type)
        yield f"{row.key}: {kind}"


def sections() -> Mapping[str, Iterator[str]]:
    from mortise.cli import command_tree

    return {
        "names": exported_names(),
        "commands": commands(command_tree()),
        "configuration": configuration_keys(),
    }


def surface() -> str:
    lines = []
    for title, entries in sections().items():
        lines += [f"[{title}]", *entries, ""]
    return "\n".join(lines)


if __name__ == "__main__":
    print(surface(), end="")
