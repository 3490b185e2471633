"""The verb ``new-plugin``: a backend distribution that works, to start from."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mortise.cli.options import json_option
from mortise.cli.output import document, print_json, results

if TYPE_CHECKING:
    from mortise.scaffold import PluginPlan


@click.command("new-plugin", short_help="Write a new backend to start from.")
@click.argument("name")
@click.option(
    "--output",
    metavar="DIR",
    help="Directory to write, which must be empty or not there yet.  [default: mortise-NAME]",
)
@click.option(
    "--vendor",
    metavar="TEXT",
    default="",
    help="Whose chip it is, for the manifest and the README.",
)
@click.option(
    "--allow-installed",
    is_flag=True,
    help="Take NAME even if something installed here has it.",
)
@json_option
def new_plugin(
    name: str, output: str | None, vendor: str, allow_installed: bool, as_json: bool
) -> None:
    """Write the distribution of a new hardware backend called NAME.

    It has a manifest, a class that answers the hook qkv_split with code of its own and leaves the
    others to the reference, tests on the conformance kit, settings for continuous integration and
    a README. It can be installed and used as it is; make it your chip's, hook by hook.
    """
    from mortise.scaffold import plan_plugin, render_plugin, write_whole

    plan = plan_plugin(name, vendor=vendor, allow_installed=allow_installed)
    directory = Path(output or plan.distribution).absolute()
    texts = render_plugin(plan)
    write_whole(directory, texts)
    written = [str(path) for path in texts]
    if as_json:
        print_json(document(**_fields(plan, directory, written)))
        return
    _show(plan, directory, written)


def _fields(plan: PluginPlan, directory: Path, written: list[str]) -> dict[str, Any]:
    return {
        "name": plan.name,
        "distribution": plan.distribution,
        "package": plan.package,
        "directory": str(directory),
        "files": written,
    }


def _show(plan: PluginPlan, directory: Path, written: list[str]) -> None:
    lines = [
        f"{directory}:",
        *(f"  {path}" for path in written),
        "",
        "Install it, find it in the list, judge it:",
        f"  cd {shlex.quote(str(directory))}",
        "  pip install --editable . --group test",
        "  mortise backends",
        f"  mortise conformance {plan.name}",
    ]
    results().print("\n".join(lines), markup=False, soft_wrap=True)
