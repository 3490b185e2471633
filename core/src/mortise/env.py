"""The only reader of the environment, once, at start."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mortise.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

CONFIG_VARIABLE = "MORTISE_CONFIG"
BF16_DISPATCH_VARIABLE = "SGLANG_DEEPEP_BF16_DISPATCH"

# As torchrun sets them for each process it starts.
RANK_VARIABLE = "RANK"
WORLD_SIZE_VARIABLE = "WORLD_SIZE"
LOCAL_RANK_VARIABLE = "LOCAL_RANK"
MASTER_ADDR_VARIABLE = "MASTER_ADDR"
MASTER_PORT_VARIABLE = "MASTER_PORT"
AGENT_STORE_VARIABLE = "TORCHELASTIC_USE_AGENT_STORE"
LAUNCH_VARIABLES = (
    RANK_VARIABLE,
    WORLD_SIZE_VARIABLE,
    LOCAL_RANK_VARIABLE,
    MASTER_ADDR_VARIABLE,
    MASTER_PORT_VARIABLE,
)

TRUE_TEXTS = ("1", "true", "yes", "on")
FALSE_TEXTS = ("0", "false", "no", "off")


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """One process among several that torchrun started together.

    Args:
        rank: number of this process among all, from 0.
        world_size: how many there are.
        local_rank: number of this process among those of its machine.
        master_addr, master_port: where the processes meet.
        agent_store: the launcher itself listens there; otherwise rank 0 does.
    """

    rank: int
    world_size: int
    local_rank: int
    master_addr: str
    master_port: int
    agent_store: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """What the environment said when the process started.

    Args:
        config_path: ``MORTISE_CONFIG``, the path of a TOML engine configuration, as given.
        bf16_dispatch: the deprecated ``SGLANG_DEEPEP_BF16_DISPATCH``; None when it is not set,
            which is not the same as false.
        launch: this process's place among those that torchrun started; None without torchrun.
    """

    config_path: str | None = None
    bf16_dispatch: bool | None = None
    launch: Launch | None = None


def read_environment(environ: Mapping[str, str] = os.environ) -> Environment:
    """Read every variable that Mortise knows; an empty variable counts as not set.

    Warns:
        DeprecationWarning: ``SGLANG_DEEPEP_BF16_DISPATCH`` is set.

    Raises:
        ConfigError: a variable holds a text that cannot be read as its type, or torchrun's
            variables are incomplete or contradict each other.
    """
    bf16_dispatch = read_bool(environ, BF16_DISPATCH_VARIABLE)
    if bf16_dispatch is not None:
        warnings.warn(
            f"the environment variable {BF16_DISPATCH_VARIABLE} is deprecated: set dispatch.dtype"
            ' = "bf16" (and dispatch.draft_dtype for a draft model) in the engine configuration',
            DeprecationWarning,
            stacklevel=2,
        )
    return Environment(
        config_path=environ.get(CONFIG_VARIABLE) or None,
        bf16_dispatch=bf16_dispatch,
        launch=read_launch(environ),
    )


def read_launch(environ: Mapping[str, str] = os.environ) -> Launch | None:
    """Read what torchrun tells each process, None where it tells nothing.

    Raises:
        ConfigError: some variables are set and others are not, or a number is impossible.
    """
    texts = {name: environ.get(name, "").strip() for name in LAUNCH_VARIABLES}
    missing = [name for name, text in texts.items() if not text]
    if len(missing) == len(texts):
        return None
    if missing:
        given = ", ".join(f"{name}={text}" for name, text in texts.items() if text)
        raise ConfigError(
            f"environment variables of torchrun are missing: {', '.join(missing)}",
            details=[f"set are {given}"],
            expected=f"all of {', '.join(LAUNCH_VARIABLES)}, or none",
            remedy="start the processes with torchrun, or unset these variables",
        )
    world_size = _read_number(texts, WORLD_SIZE_VARIABLE, 1, 2**31 - 1)
    return Launch(
        rank=_read_number(texts, RANK_VARIABLE, 0, world_size - 1),
        world_size=world_size,
        local_rank=_read_number(texts, LOCAL_RANK_VARIABLE, 0, world_size - 1),
        master_addr=texts[MASTER_ADDR_VARIABLE],
        master_port=_read_number(texts, MASTER_PORT_VARIABLE, 1, 2**16 - 1),
        agent_store=read_bool(environ, AGENT_STORE_VARIABLE) or False,
    )


def _read_number(texts: Mapping[str, str], name: str, smallest: int, largest: int) -> int:
    text = texts[name]
    number = int(text) if text.isdecimal() else -1
    if smallest <= number <= largest:
        return number
    raise ConfigError(
        f"environment variable {name} is {text!r}",
        expected=f"a number from {smallest} to {largest}",
        remedy="start the processes with torchrun, or unset its variables",
    )


def read_bool(environ: Mapping[str, str], name: str) -> bool | None:
    """Read ``1 true yes on`` and ``0 false no off`` in any case, None when not set or empty.

    Raises:
        ConfigError: any other text.
    """
    text = environ.get(name, "").strip()
    if not text:
        return None
    if text.lower() in TRUE_TEXTS:
        return True
    if text.lower() in FALSE_TEXTS:
        return False
    raise ConfigError(
        f"environment variable {name} is {text!r}",
        expected=f"one of {', '.join(TRUE_TEXTS)} or {', '.join(FALSE_TEXTS)}",
        remedy=f"correct or unset {name}",
    )
