"""The dispatch format that the user asks for, by model role and exchange, and where it was said."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from mortise.config.resolve import DEFAULT
from mortise.spec.dispatch import DispatchDtype, DispatchMode, Override
from mortise.spec.roles import ModelRole

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mortise.config import ResolvedConfig

FIELDS: Final[Mapping[tuple[ModelRole, DispatchMode], tuple[str, str]]] = MappingProxyType(
    {
        (ModelRole.MAIN, DispatchMode.NORMAL): ("dispatch.normal_dtype", "dispatch.dtype"),
        (ModelRole.MAIN, DispatchMode.LOW_LATENCY): (
            "dispatch.low_latency_dtype",
            "dispatch.dtype",
        ),
        (ModelRole.DRAFT, DispatchMode.NORMAL): (
            "draft.normal_dispatch_dtype",
            "draft.dispatch_dtype",
        ),
        (ModelRole.DRAFT, DispatchMode.LOW_LATENCY): (
            "draft.low_latency_dispatch_dtype",
            "draft.dispatch_dtype",
        ),
    }
)
"""Keys that speak of each role and mode, the more specific one first."""


def dispatch_override(
    resolved: ResolvedConfig, role: ModelRole, mode: DispatchMode
) -> Override | None:
    """The user's word on one model and exchange; None where it is left to layers and backend.

    The strongest source that says anything about them is heard, and in it the mode's own key
    before the general one. ``auto`` is a word too: on the command line it takes back what a file
    says.
    """
    origins = {key: resolved.origins[key] for key in FIELDS[role, mode]}
    said = [key for key, origin in origins.items() if origin != DEFAULT]
    if not said:
        return None
    # Of equals the first is taken, which is the mode's own.
    key = max(said, key=lambda key: resolved.sources.index(origins[key]))
    section, _, name = key.partition(".")
    value: str = getattr(getattr(resolved.config, section), name)
    if value == "auto":
        return None
    return Override(value=DispatchDtype(value), source=origins[key])


def dispatch_overrides(
    resolved: ResolvedConfig, role: ModelRole
) -> Mapping[DispatchMode, Override]:
    """The user's word on one model, by exchange; an exchange that is left alone is not in it."""
    found = {mode: dispatch_override(resolved, role, mode) for mode in DispatchMode}
    return MappingProxyType({mode: one for mode, one in found.items() if one is not None})
