"""The configuration of each model that ``eval`` measures, made of the one that was asked for."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from mortise.config.resolve import DEFAULT
from mortise.config.table import FrozenTable

if TYPE_CHECKING:
    from mortise.config import ResolvedConfig


def without_draft(resolved: ResolvedConfig) -> ResolvedConfig:
    """The same configuration without drafting, which changes no logits: no draft is loaded."""
    draft = resolved.config.draft.model_copy(update={"num_tokens": 0})
    return replace(
        resolved,
        config=resolved.config.model_copy(update={"draft": draft}),
        origins=FrozenTable({**resolved.origins, "draft.num_tokens": "mortise eval"}),
    )


def with_own_dispatch(resolved: ResolvedConfig) -> ResolvedConfig:
    """The same configuration without the user's word on dispatch formats.

    For the model that others are compared with: it stays the same whatever is asked of them, and
    experts that are not quantised take nothing but rows as they are.
    """
    from mortise.engine.dispatch_overrides import FIELDS
    from mortise.spec.roles import ModelRole

    keys = {key for (role, _), pair in FIELDS.items() if role is ModelRole.MAIN for key in pair}
    names = {key.removeprefix("dispatch.") for key in keys}
    silent = {name: type(resolved.config.dispatch).model_fields[name].default for name in names}
    return replace(
        resolved,
        config=resolved.config.model_copy(
            update={"dispatch": resolved.config.dispatch.model_copy(update=silent)}
        ),
        origins=FrozenTable({**resolved.origins, **dict.fromkeys(keys, DEFAULT)}),
    )


def with_fields(resolved: ResolvedConfig, source: str, **fields: str) -> ResolvedConfig:
    """The same configuration with other values."""
    return replace(
        resolved,
        config=resolved.config.model_copy(update=fields),
        origins=FrozenTable({**resolved.origins, **dict.fromkeys(fields, source)}),
    )
