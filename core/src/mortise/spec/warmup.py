"""What a backend has to compile before a model runs, and what it is told to find that out."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING

from mortise.spec.paged_mqa import IndexKeyDtype

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Mapping

    import torch

    from mortise.spec.dispatch import DispatchDecision, DispatchMode
    from mortise.spec.experts import ExpertWeights
    from mortise.spec.qkv import QKVShape
    from mortise.spec.roles import ModelRole
    from mortise.spec.weights import LinearWeight


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmupRequest:
    """Everything that a loaded model is going to ask of a backend; nothing else is in use.

    Args:
        role: which model of the run.
        experts: the experts of every layer, prepared.
        linears: every quantised projection outside the experts, prepared.
        dispatch: what was decided for each layer of experts, one for each mode, by its name.
        modes: exchanges that passes of this run may use.
        max_tokens: the most tokens of this process in one pass.
        max_tokens_per_rank: the most of them in a pass by the low-latency exchange, which has
            places for as many from every process; 0 where nothing limits them.
        num_experts_per_tok: K; 0 of a model without experts.
        world_size: processes that share the experts.
        compute_dtype: dtype of the hidden state.
        index_heads, index_head_dim: N and D of the indexer; 0 of a model without one.
        index_key_dtype: how its keys are cached.
        qkv_shapes: the different shapes of fused projections that are split.
        ahead: the user asked for it ahead of time (``mortise warmup``): whatever the backend keeps
            on disk is made complete, however long it takes. At a start of the engine it is False.
    """

    role: ModelRole
    experts: tuple[ExpertWeights, ...] = ()
    linears: tuple[LinearWeight, ...] = ()
    dispatch: Mapping[str, tuple[DispatchDecision, ...]] = field(
        default_factory=lambda: MappingProxyType({})
    )
    modes: tuple[DispatchMode, ...]
    max_tokens: int
    max_tokens_per_rank: int = 0
    num_experts_per_tok: int = 0
    world_size: int = 1
    compute_dtype: torch.dtype
    index_heads: int = 0
    index_head_dim: int = 0
    index_key_dtype: IndexKeyDtype = IndexKeyDtype.COMPUTE
    qkv_shapes: tuple[QKVShape, ...] = ()
    ahead: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmupJob:
    """One thing to compile, with no other job before it.

    Args:
        name: what it is, for people, in a few words with its sizes.
        key: jobs of equal keys are one.
        run: does it; called once, on a thread of its own beside other jobs, in inference mode as
            hooks are. An exception ends the warm-up.
    """

    name: str
    key: Hashable
    run: Callable[[], None]
