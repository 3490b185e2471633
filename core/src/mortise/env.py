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

TRUE_TEXTS = ("1", "true", "yes", "on")
FALSE_TEXTS = ("0", "false", "no", "off")


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """What the environment said when the process started.

    Args:
        config_path: ``MORTISE_CONFIG``, the path of a TOML engine configuration, as given.
        bf16_dispatch: the deprecated ``SGLANG_DEEPEP_BF16_DISPATCH``; None when it is not set,
            which is not the same as false.
    """

    config_path: str | None = None
    bf16_dispatch: bool | None = None


def read_environment(environ: Mapping[str, str] = os.environ) -> Environment:
    """Read every variable that Mortise knows; an empty variable counts as not set.

    Warns:
        DeprecationWarning: ``SGLANG_DEEPEP_BF16_DISPATCH`` is set.

    Raises:
        ConfigError: a variable holds a text that cannot be read as its type.
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
        config_path=environ.get(CONFIG_VARIABLE) or None, bf16_dispatch=bf16_dispatch
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
