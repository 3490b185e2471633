"""The command ``mortise`` and its verbs."""

from __future__ import annotations

import click

from mortise.cli.backends import backends
from mortise.cli.conformance import conformance
from mortise.cli.doctor import doctor
from mortise.cli.eval import evaluate
from mortise.cli.explain import explain
from mortise.cli.generate import generate
from mortise.cli.group import BoundaryGroup
from mortise.cli.new_plugin import new_plugin
from mortise.cli.quantize import quantize
from mortise.cli.record import diff, record, replay
from mortise.cli.warmup import warmup


@click.group(
    cls=BoundaryGroup,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(package_name="mortise-core", message="mortise %(version)s")
@click.pass_context
def mortise(context: click.Context) -> None:
    """Run Mixture-of-Experts language models through a hardware backend chosen by name.

    Start with: mortise generate "def fibonacci(n):"

    Results go to standard output, everything else to standard error. Exit codes: 0 done; 1 a check
    failed, two backends differ, or a bug; 2 something is wrong with what was asked, and the message
    says what; 130 interrupted.
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


mortise.add_command(generate)
mortise.add_command(backends)
mortise.add_command(explain)
mortise.add_command(doctor)
mortise.add_command(evaluate)
mortise.add_command(quantize)
mortise.add_command(conformance)
mortise.add_command(warmup)
mortise.add_command(new_plugin)
mortise.add_command(record)
mortise.add_command(replay)
mortise.add_command(diff)
