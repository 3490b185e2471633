"""The backend of each model role: bound apart, so that neither can reach the other."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mortise.backends import load_backend
from mortise.config.resolve import merge
from mortise.config.table import thaw
from mortise.errors import BackendUnusableError
from mortise.kv.pages import PAGE_SIZE
from mortise.spec.reasons import ReasonCode
from mortise.spec.roles import ModelRole

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from mortise.backends import BoundBackend, Ops
    from mortise.config import EngineConfig, ResolvedConfig
    from mortise.env import Launch

    WrapOps = Callable[[Ops], Ops]
    """Puts other callables in the place of a role's hooks, such as ones that record."""


def bind_backend(
    resolved: ResolvedConfig,
    launch: Launch | None = None,
    role: ModelRole = ModelRole.MAIN,
    wrap_ops: WrapOps | None = None,
) -> BoundBackend:
    """The configured backend for one model role, its hooks wrapped where that is asked for.

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
    return bound if wrap_ops is None else replace(bound, ops=wrap_ops(bound.ops))


def backend_options(config: EngineConfig, role: ModelRole) -> Mapping[str, Mapping[str, Any]]:
    """The tables of all backends for one role, the draft's own keys before the main model's."""
    if role is ModelRole.MAIN:
        return config.backend_options
    own = config.draft.backend_options
    return merge(thaw(config.backend_options), thaw(own))
