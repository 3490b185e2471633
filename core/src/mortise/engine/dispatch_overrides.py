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

SECTION: Final = "dispatch"

FIELDS: Final[Mapping[tuple[ModelRole, DispatchMode], tuple[str, str]]] = MappingProxyType(
    {
        (ModelRole.MAIN, DispatchMode.NORMAL): ("normal_dtype", "dtype"),
        (ModelRole.MAIN, DispatchMode.LOW_LATENCY): ("low_latency_dtype", "dtype"),
        (ModelRole.DRAFT, DispatchMode.NORMAL): ("draft_normal_dtype", "draft_dtype"),
        (ModelRole.DRAFT, DispatchMode.LOW_LATENCY): ("draft_low_latency_dtype", "draft_dtype"),
    }
)
"""Fields of the section that speak of each role and mode, the more specific one first."""


def dispatch_override(
    resolved: ResolvedConfig, role: ModelRole, mode: DispatchMode
) -> Override | None:
    """The user's word on one model and exchange; None where it is left to layers and backend.

    The strongest source that says anything about them is heard, and in it the mode's own key
    before the general one. ``auto`` is a word too: on the command line it takes back what a file
    says.
    """
    origins = {name: resolved.origins[f"{SECTION}.{name}"] for name in FIELDS[role, mode]}
    said = [name for name, origin in origins.items() if origin != DEFAULT]
    if not said:
        return None
    # Of equals the first is taken, which is the mode's own.
    name = max(said, key=lambda name: resolved.sources.index(origins[name]))
    value: str = getattr(resolved.config.dispatch, name)
    if value == "auto":
        return None
    return Override(value=DispatchDtype(value), source=origins[name])


def dispatch_overrides(
    resolved: ResolvedConfig, role: ModelRole
) -> Mapping[DispatchMode, Override]:
    """The user's word on one model, by exchange; an exchange that is left alone is not in it."""
    found = {mode: dispatch_override(resolved, role, mode) for mode in DispatchMode}
    return MappingProxyType({mode: one for mode, one in found.items() if one is not None})
