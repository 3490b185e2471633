"""What the code offers and the documentation does not mention, kind by kind."""

from __future__ import annotations

import inspect
import re
from typing import TYPE_CHECKING

import click

from mortise import errors
from mortise.cli import command_tree
from mortise.config import describe
from mortise.spec import hooks, reasons
from tests.docs import hook_pages, manifest_page, records_page
from tests.docs.pages import DOCS

if TYPE_CHECKING:
    from collections.abc import Iterator

ROW = re.compile(r"^\| \[?`([\w.]+)`[^|\n]*\|(.+)\|$", flags=re.MULTILINE)


def text_of(page: str) -> str:
    """A page below docs; nothing where there is none."""
    path = DOCS / page
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def rows(text: str) -> dict[str, bool]:
    """The code word that begins each row of the tables, and whether no other cell is empty."""
    return {name: all(map(str.strip, rest.split("|"))) for name, rest in ROW.findall(text)}


def section(text: str, heading: str) -> str:
    """What stands below one heading, up to the next of its level."""
    _, found, rest = f"\n{text}".partition(f"\n## {heading}\n")
    return rest.partition("\n## ")[0] if found else ""


def hooks_without_a_page() -> Iterator[str]:
    """Hooks that the overview does not list, or whose page lacks a part of the contract."""
    overview = rows(text_of("reference/hooks.md"))
    for hook in hooks.HOOKS:
        written = hook_pages.sections(text_of(f"reference/hooks/{hook}.md"))
        if hook not in overview:
            yield f"{hook}: no row in reference/hooks.md"
        for heading in hook_pages.SECTIONS:
            if not written.get(heading):
                yield f"{hook}: reference/hooks/{hook}.md says nothing under {heading}"


def parameters_without_a_meaning() -> Iterator[str]:
    """Parameters of hooks that their page does not explain."""
    for hook in hooks.HOOKS:
        head = text_of(f"reference/hooks/{hook}.md").partition(hook_pages.END)[0]
        explained = rows(head)
        for parameter in inspect.signature(getattr(hooks, hook)).parameters:
            if not explained.get(parameter):
                yield f"{hook}({parameter})"


def record_fields() -> Iterator[str]:
    """Fields of the records that hooks are given and give back, and members of enumerations."""
    page = text_of("reference/records.md")
    told = {name: rest for name, _, rest in (part.partition("\n") for part in page.split("\n### "))}
    for things in records_page.exported().values():
        for kind in filter(inspect.isclass, things):
            text = told.get(kind.__name__, "")
            if not text:
                yield kind.__name__
            for name, meaning in records_page.meanings(kind).items():
                if not meaning or f"\n| `{name}` | " not in text:
                    yield f"{kind.__name__}.{name}"


def codes_without_a_remedy() -> Iterator[str]:
    """Reason codes without a row."""
    explained = rows(text_of("reference/reason-codes.md"))
    return (code.value for code in reasons.ReasonCode if not explained.get(code.value))


def keys_of_the_manifest() -> Iterator[str]:
    """Keys of ``backend.toml`` without a meaning and an example."""
    page = text_of("reference/manifest.md")
    tables = {"": rows(section(page, "Keys"))}
    for row in manifest_page.manifest_rows():
        table, _, name = row.key.rpartition(".")
        known = tables.setdefault(table, rows(section(page, f"`[{table}]`")))
        if not known.get(name) or not row.meaning:
            yield row.key


def keys_of_the_configuration() -> Iterator[str]:
    """Keys of the configuration without a meaning."""
    page = text_of("reference/config.md")
    for row in describe.config_rows():
        table, _, name = row.key.rpartition(".")
        if not rows(section(page, f"`[{table}]`" if table else "Top level")).get(name):
            yield row.key


def options_of_the_commands() -> Iterator[str]:
    """Commands, and options of commands, without a word of help on the page."""
    page = text_of("reference/cli.md")
    tree = command_tree()
    for name, command in tree.commands.items():
        shown = section(page, f"mortise {name}")
        if not shown:
            yield f"mortise {name}"
        for parameter in command.params:
            if isinstance(parameter, click.Option) and not _is_shown(parameter, shown):
                yield f"mortise {name} {parameter.opts[0]}"


def _is_shown(option: click.Option, shown: str) -> bool:
    """Whether a row begins with all spellings of the option and ends with its meaning."""
    lines = [line for line in shown.splitlines() if line.startswith(("| `", "| <code>"))]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    spelt = {*option.opts, *option.secondary_opts}
    words = [(set(re.findall(r"(?<![\w-])--?\w[\w-]*", first)), rest[-1]) for first, *rest in cells]
    return any(spelt <= named and meaning for named, meaning in words)


def error_classes() -> Iterator[str]:
    """Classes of errors without a row, or missing from the drawn tree."""
    explained = rows(text_of("reference/errors.md"))
    for kind in vars(errors).values():
        if not inspect.isclass(kind) or not issubclass(kind, errors.MortiseError):
            continue
        if not explained.get(kind.__name__) or kind.__name__ not in (errors.__doc__ or ""):
            yield kind.__name__


def undocumented() -> dict[str, list[str]]:
    """Everything that a reader could meet and not look up, by kind."""
    return {
        "hook": list(hooks_without_a_page()),
        "parameter": list(parameters_without_a_meaning()),
        "record field": list(record_fields()),
        "reason code": list(codes_without_a_remedy()),
        "manifest field": list(keys_of_the_manifest()),
        "configuration key": list(keys_of_the_configuration()),
        "option": list(options_of_the_commands()),
        "error class": list(error_classes()),
    }
