"""The one boundary of the command line: whatever is raised becomes a message and an exit code."""

from __future__ import annotations

import difflib
import io
import os
import sys
import traceback
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn

import click

from mortise.cli.failure import Failure, show_failure
from mortise.cli.speaker import is_speaker, one_voice
from mortise.env import read_launch
from mortise.errors import MortiseError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mortise.env import Launch

EXIT_BUG = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130
EXIT_PIPE_CLOSED = 141


class PipeClosedError(Exception):
    """Whoever read standard output left; not an error of ours."""


class BoundaryGroup(click.Group):
    """A group of commands that never shows a traceback for what its user can mend."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Run a command line; leaves with an exit code unless ``standalone_mode`` is off."""
        arguments = list(sys.argv[1:] if args is None else args)
        if not standalone_mode:
            return super().main(arguments, prog_name, complete_var, False, **extra)
        as_json = wants_json(arguments)
        _print_whatever_comes()
        launch: Launch | None = None
        try:
            launch = read_launch()
            with one_voice(launch):
                code = super().main(arguments, prog_name, complete_var, False, obj=launch, **extra)
            sys.stdout.flush()
        except MortiseError as error:
            show_failure(failure_of(error, launch), as_json)
            sys.exit(error.exit_code)
        except click.ClickException as error:
            show_failure(usage_failure(error), as_json)
            sys.exit(EXIT_USAGE)
        except (click.Abort, KeyboardInterrupt):
            click.echo("\ninterrupted", err=True)
            sys.exit(EXIT_INTERRUPTED)
        except (PipeClosedError, BrokenPipeError):
            _leave_closed_pipe()
        except Exception:
            traceback.print_exc()
            click.echo("\nThis is a bug: please report it with the lines above.", err=True)
            sys.exit(EXIT_BUG)
        sys.exit(code if isinstance(code, int) else 0)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the verb; click would turn a closed pipe into a bare exit code."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError as error:
            raise PipeClosedError from error

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find a verb; a misspelt one brings the ones that it resembles."""
        if args and self.get_command(ctx, args[0]) is None:
            close = difflib.get_close_matches(args[0], self.list_commands(ctx), n=2)
            raise UnknownVerbError(args[0], close, self.list_commands(ctx), ctx)
        return super().resolve_command(ctx, args)


def failure_of(error: MortiseError, launch: Launch | None) -> Failure:
    """What to show of an error; of several processes, only the first one tells all of it."""
    failure = Failure.of(error)
    if launch is None:
        return failure
    what = f"process {launch.rank} of {launch.world_size}: {failure.what}"
    if is_speaker(launch):
        return replace(failure, what=what)
    return Failure(kind=failure.kind, what=what, reason=failure.reason)


class UnknownVerbError(click.UsageError):
    """There is no such verb."""

    def __init__(
        self, name: str, close: Sequence[str], known: Sequence[str], ctx: click.Context
    ) -> None:
        super().__init__(f"no command {name!r}", ctx)
        self.close = tuple(close)
        self.known = tuple(known)


def wants_json(arguments: Sequence[str]) -> bool:
    """Whether a command line asks for JSON, even one that cannot be parsed."""
    options = arguments[: arguments.index("--")] if "--" in arguments else arguments
    return "--json" in options


def usage_failure(error: click.ClickException) -> Failure:
    """What is wrong with the command line itself."""
    context = getattr(error, "ctx", None)
    command = "mortise" if context is None else context.command_path
    close: Sequence[str] = ()
    expected = None
    message = error.format_message().rstrip(".")
    match error:
        case UnknownVerbError():
            close, expected = error.close, f"one of {', '.join(error.known)}"
        case click.NoSuchOption():
            close = error.possibilities or ()
            message = f"no option {error.option_name!r} of {command!r}"
    hint = f"did you mean {' or '.join(map(repr, close))}?" if close else None
    return Failure(
        kind=type(error).__name__,
        what=message[:1].lower() + message[1:],
        details=(hint,) if hint else (),
        expected=expected,
        remedy=f"see {command} --help",
    )


def _print_whatever_comes() -> None:
    """A terminal without some character shows a question mark instead of ending the program."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and "utf" not in stream.encoding.lower():
            stream.reconfigure(errors="replace")


def _leave_closed_pipe() -> NoReturn:
    # Python flushes standard output once more at exit, which would fail as loudly.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(EXIT_PIPE_CLOSED)
