"""The backend of each model role: bound apart, so that neither can reach the other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mortise.backends import load_backend
from mortise.config.resolve import merge
from mortise.config.table import thaw
from mortise.errors import BackendUnusableError
from mortise.kv.pages import PAGE_SIZE
from mortise.spec.reasons import ReasonCode
from mortise.spec.roles import ModelRole

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mortise.backends import BoundBackend
    from mortise.config import EngineConfig, ResolvedConfig
    from mortise.env import Launch


def bind_backend(
    resolved: ResolvedConfig, launch: Launch | None = None, role: ModelRole = ModelRole.MAIN
) -> BoundBackend:
    """The configured backend for one model role.

    Raises:
        BackendError: it cannot be had, or serves no pages of the cache's size.
    """
    config = resolved.config
    bound = load_backend(
        config.backend,
        role=role,
        device=config.device,
        options_by_name=backend_options(config, role),
        strict=config.strict,
        source=resolved.origins["backend"],
        local_rank=0 if launch is None else launch.local_rank,
    )
    served = bound.ops.capabilities.page_sizes
    if PAGE_SIZE not in served:
        raise BackendUnusableError(
            f"backend {bound.ops.backend.name!r} serves no cache pages of {PAGE_SIZE} tokens",
            reason=ReasonCode.REQUEST_UNSUPPORTED,
            details=[f"it serves: {', '.join(map(str, sorted(served)))}"],
            remedy="use another backend",
        )
    return bound


def backend_options(config: EngineConfig, role: ModelRole) -> Mapping[str, Mapping[str, Any]]:
    """The tables of all backends for one role, the draft's own keys before the main model's."""
    if role is ModelRole.MAIN:
        return config.backend_options
    own = config.draft.backend_options
    return merge(thaw(config.backend_options), thaw(own))
