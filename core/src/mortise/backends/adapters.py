"""Serving backends that answer the previous version of a hook, for as long as that is promised."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from mortise.spec import hooks

Answer = Callable[..., Any]
"""An implementation of a hook, bound to its backend."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HookAdapter:
    """How answers in the previous version of a hook become answers in the current one.

    A breaking change of a hook raises its version and leaves one of these behind for two minor
    releases of the core.

    Args:
        hook: whose.
        version: the previous version, one less than the current.
        parameters: names of that version's parameters, in order.
        adapt: makes of an implementation of that version one of the current version.
        removed_in: release of the core that refuses that version.
    """

    hook: str
    version: int
    parameters: tuple[str, ...]
    adapt: Callable[[Answer], Answer]
    removed_in: str


ADAPTERS: Final[Mapping[str, HookAdapter]] = MappingProxyType({})
"""By hook. No hook has changed yet: all are at version 1."""


PARAMETERS: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {name: tuple(inspect.signature(getattr(hooks, name)).parameters) for name in hooks.HOOKS}
)
"""Names of each hook's parameters in its current version, in order."""


def adapter_of(hook: str, version: int) -> HookAdapter | None:
    """What serves a version of a hook that is not the current one; None if nothing does."""
    adapter = ADAPTERS.get(hook)
    return adapter if adapter is not None and adapter.version == version else None


def parameters_of(hook: str, version: int) -> tuple[str, ...]:
    """Names of the parameters of one version of a hook, in order."""
    adapter = adapter_of(hook, version)
    return PARAMETERS[hook] if adapter is None else adapter.parameters


def adapters_of(implements: Mapping[str, int]) -> Mapping[str, HookAdapter]:
    """The hooks of a manifest that are served through an adapter."""
    found = ((hook, adapter_of(hook, version)) for hook, version in implements.items())
    return {hook: adapter for hook, adapter in found if adapter is not None}
