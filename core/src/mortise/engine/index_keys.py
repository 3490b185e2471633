"""How the indexer's keys are cached, and why so."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mortise.backends import Decision
from mortise.errors import ConfigError
from mortise.spec.paged_mqa import IndexKeyDtype

if TYPE_CHECKING:
    from mortise.backends import Ops
    from mortise.config import ResolvedConfig


def index_key_decision(
    index_head_dim: int, resolved: ResolvedConfig, dtype: torch.dtype, ops: Ops
) -> tuple[IndexKeyDtype, tuple[Decision, ...]]:
    """What the configuration comes to for one model; no decision where it has no indexer."""
    if not index_head_dim:
        return IndexKeyDtype.COMPUTE, ()
    chosen, decision = decide_index_key_dtype(
        resolved.config.index_key_dtype, resolved.origins["index_key_dtype"], dtype, ops
    )
    return chosen, (decision,)


def decide_index_key_dtype(
    asked: str, source: str, dtype: torch.dtype, ops: Ops
) -> tuple[IndexKeyDtype, Decision]:
    """Choose for a model that has an indexer: the user, then exactness, then the backend.

    Args:
        asked: ``index_key_dtype`` of the configuration.
        source: where that came from.
        dtype: of the hidden state.
        ops: the bound backend, which serves some.

    Raises:
        ConfigError: the user asks for what the backend does not serve.
    """
    served, name = ops.capabilities.index_key_dtypes, ops.backend.name
    if asked != "auto":
        chosen, rule, reason = IndexKeyDtype(asked), "override", "configured"
    elif dtype is torch.float32 and IndexKeyDtype.COMPUTE in served:
        chosen, rule, source = IndexKeyDtype.COMPUTE, "exact", "dtype"
        reason = "who computes in float32 wants no rounded keys"
    else:
        chosen, rule, reason = served[0], "backend", f"{name} prefers it"
    if chosen not in served:
        raise ConfigError(
            f"index_key_dtype is {chosen.value!r}, which backend {name!r} does not serve",
            details=[f"set by {source}"],
            expected=f"one of auto, {', '.join(served)}",
            remedy="set index_key_dtype to auto, or use another backend",
        )
    return chosen, Decision(
        role=ops.role,
        subject="index keys",
        value=chosen.value,
        rule=rule,
        reason=reason,
        source=source,
    )
