"""The table of hooks that a model calls: typed, positional, bound once for one model role."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from mortise.spec.capabilities import (
        Capabilities,
        ExpertLayerRequest,
        LinearLayerRequest,
        Support,
    )
    from mortise.spec.dispatch import (
        DispatchDecision,
        DispatchedTokens,
        DispatchRequest,
        TokenDispatcher,
        TokenDispatcherRequest,
    )
    from mortise.spec.experts import ExpertWeights
    from mortise.spec.hooks import NotSupported
    from mortise.spec.paged_mqa import IndexKeyPages, PagedMQAMetadata
    from mortise.spec.qkv import QKVParts, QKVShape
    from mortise.spec.roles import ForwardMode, ModelRole
    from mortise.spec.weights import LinearWeight


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendIdentity:
    """Who answers: a backend, the distribution that brings it, and whether it is emulated."""

    name: str
    distribution: str
    version: str
    emulated: bool

    def __str__(self) -> str:
        emulated = ", emulated" if self.emulated else ""
        return f"{self.name} ({self.distribution} {self.version}{emulated})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ops:
    """One backend's answers for one model role.

    The hooks mean what ``mortise.spec.hooks`` says and take their arguments by position, in the
    order given there. An exception of a hook carries a note naming hook, backend, distribution,
    version, role and, where it is known, layer; a hook that returns None raises ``ContractError``.

    Args:
        supports: asks before a layer of experts is built whether it can be served.
        supports_linear: asks the same before a quantised projection outside the experts is built.
        capabilities: facts to plan with.
        role: the model it is bound for.
        backend: who answers, unless a decision records a fallback for a hook.
    """

    resolve_dispatch_dtype: Callable[[DispatchRequest], DispatchDecision]
    prepare_expert_weights: Callable[[ExpertWeights, DispatchDecision], ExpertWeights]
    prepare_linear_weight: Callable[[LinearWeight], LinearWeight]
    create_token_dispatcher: Callable[[TokenDispatcherRequest], TokenDispatcher | NotSupported]
    paged_mqa_metadata: Callable[[torch.Tensor, int, int, ForwardMode], PagedMQAMetadata]
    paged_mqa_logits: Callable[
        [torch.Tensor, IndexKeyPages, torch.Tensor, torch.Tensor, PagedMQAMetadata], torch.Tensor
    ]
    quantized_moe_apply: Callable[[DispatchedTokens, ExpertWeights, torch.dtype], torch.Tensor]
    quantized_linear: Callable[[torch.Tensor, LinearWeight, torch.dtype], torch.Tensor]
    qkv_split: Callable[[torch.Tensor, torch.Tensor, QKVShape], QKVParts]
    supports: Callable[[ExpertLayerRequest], Support]
    supports_linear: Callable[[LinearLayerRequest], Support]
    capabilities: Capabilities
    role: ModelRole
    backend: BackendIdentity
