"""Options that several verbs share, and the configuration that they amount to."""

from __future__ import annotations

import warnings
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from mortise.cli.failure import show_warning
from mortise.cli.settings import setting_layers

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from mortise.config import Layer, ResolvedConfig
    from mortise.env import Environment

    Command = TypeVar("Command", bound=Callable[..., Any])

# Each option of the command line, its parameter's name, and the key of the configuration it sets.
CONFIGURATION_OPTIONS: Final = (
    ("--model", "model", "model"),
    ("--backend", "backend", "backend"),
    ("--device", "device", "device"),
    ("--dtype", "dtype", "dtype"),
    ("--dispatch-dtype", "dispatch_dtype", "dispatch.dtype"),
    ("--draft", "draft", "draft.num_tokens"),
    ("--draft-model", "draft_model", "draft.model"),
    ("--draft-quantization", "draft_quantization", "draft.quantization"),
    ("--draft-dispatch-dtype", "draft_dispatch_dtype", "draft.dispatch_dtype"),
    ("--threads", "threads", "threads"),
    ("--strict", "strict", "strict"),
)

# What is said of a draft model that there may not be.
OPTIONS_OF_A_DRAFT: Final = MappingProxyType(
    {name: flag for flag, name, _ in CONFIGURATION_OPTIONS if name.startswith("draft_")}
)


def configuration_options(command: Command) -> Command:
    """Add the options that describe an engine."""
    return configuration_options_but()(command)


def configuration_options_but(*left_out: str) -> Callable[[Command], Command]:
    """As :func:`configuration_options`, for a verb that has some of them in a way of its own.

    Args:
        left_out: their names; whoever resolves the configuration sets them.
    """

    def add_all(command: Command) -> Command:
        for name, add in reversed(_configuration_options().items()):
            if name not in left_out:
                command = add(command)
        return command

    return add_all


def _configuration_options() -> dict[str, Callable[[Any], Any]]:
    """Each option by the name of its parameter, in the order in which help shows them."""
    return {
        "model": click.option(
            "--model",
            metavar="PATH",
            help="Model directory in the Hugging Face layout.  [default: builtin]",
        ),
        "backend": click.option(
            "--backend",
            metavar="NAME",
            help="Installed backend, or auto; see `mortise backends`.  [default: reference]",
        ),
        "device": click.option(
            "--device", metavar="TEXT", help="Device, in the backend's own words."
        ),
        "dtype": click.option(
            "--dtype",
            metavar="auto|bfloat16|float32",
            help="Type of the hidden state; auto is what the checkpoint says.",
        ),
        "dispatch_dtype": click.option(
            "--dispatch-dtype",
            metavar="auto|bf16|fp8|int8|nvfp4",
            help="Format in which tokens travel to the experts.",
        ),
        "draft": click.option(
            "--draft",
            type=int,
            metavar="K",
            help="Tokens that the model's multi-token prediction layer drafts a step; 0 drafts"
            " none.  [default: 0]",
        ),
        "draft_model": click.option(
            "--draft-model",
            metavar="PATH",
            help="Model directory whose multi-token prediction layer drafts."
            "  [default: the model's own]",
        ),
        "draft_quantization": click.option(
            "--draft-quantization",
            metavar="auto|none",
            help="How the draft model is quantised: auto is as its checkpoint says, none is"
            " not at all.",
        ),
        "draft_dispatch_dtype": click.option(
            "--draft-dispatch-dtype",
            metavar="auto|bf16|fp8|int8|nvfp4",
            help="Format in which tokens travel to the draft model's experts.",
        ),
        "threads": click.option(
            "--threads", type=int, help="Threads of one operation on the processor."
        ),
        "strict": click.option(
            "--strict",
            is_flag=True,
            default=None,
            help="Make it an error when the reference stands in for a hook.",
        ),
        "settings": click.option(
            "--set",
            "settings",
            multiple=True,
            metavar="KEY=VALUE",
            help="Any key of the configuration, as in a file: --set"
            " dispatch.low_latency_dtype=bf16. May be given repeatedly.",
        ),
        "config_path": click.option(
            "--config",
            "config_path",
            metavar="FILE",
            help="Engine configuration in TOML; the options here go before it."
            "  [default: $MORTISE_CONFIG]",
        ),
    }


def json_option(command: Command) -> Command:
    """Add ``--json``."""
    return click.option(
        "--json", "as_json", is_flag=True, help="Print one JSON document; errors too, on stderr."
    )(command)


def resolve_options(options: Mapping[str, Any]) -> ResolvedConfig:
    """The configuration of a run: defaults, environment, file, command line, the weakest first.

    Args:
        options: what :func:`configuration_options` gave.

    Raises:
        ConfigError: a key or a value is wrong, wherever it came from.
        click.UsageError: an option is about a draft model, and nothing drafts.
    """
    from mortise.config import resolve
    from mortise.env import read_environment

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        environment = read_environment()
    for warning in caught:
        show_warning(str(warning.message))
    resolved = resolve(configuration_layers(environment, options))
    _require_draft(resolved, options)
    return resolved


def _require_draft(resolved: ResolvedConfig, options: Mapping[str, Any]) -> None:
    """Refuse options without an effect; beside ``--draft 0`` they are switched off on purpose."""
    given = [flag for name, flag in OPTIONS_OF_A_DRAFT.items() if options[name] is not None]
    if given and options["draft"] is None and not resolved.config.draft.num_tokens:
        verb = "has" if len(given) == 1 else "have"
        raise click.UsageError(
            f"{' and '.join(given)} {verb} no effect without --draft K or draft.num_tokens"
        )


def configuration_layers(environment: Environment, options: Mapping[str, Any]) -> list[Layer]:
    """Where the values of a configuration may come from, the weakest first.

    Args:
        environment: what the environment says.
        options: what :func:`configuration_options` gave.

    Raises:
        ConfigError: a configuration file is missing or not TOML.
        click.UsageError: a ``--set`` is no ``KEY=VALUE``.
    """
    from mortise.config import option_layer, standard_layers

    given = [
        option_layer(flag, key, options[name])
        for flag, name, key in CONFIGURATION_OPTIONS
        if options[name] is not None
    ]
    given += setting_layers(options["settings"])
    return standard_layers(environment, options["config_path"], given)
