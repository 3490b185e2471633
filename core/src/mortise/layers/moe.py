"""A layer of routed and shared experts, whose only way out of the core is the bound hooks."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Final

import torch
from torch import nn

from mortise.errors import BackendUnusableError, ContractError
from mortise.spec.capabilities import ExpertLayerRequest
from mortise.spec.dispatch import (
    DispatchDecision,
    DispatchDtype,
    DispatchMode,
    DispatchRequest,
    Override,
    TokenDispatcher,
    TokenDispatcherRequest,
)
from mortise.spec.experts import ExpertWeights
from mortise.spec.hooks import NotSupported
from mortise.spec.reasons import ReasonCode
from mortise.spec.weights import StoredWeight, WeightScheme

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mortise.backends.ops import Ops
    from mortise.layers.mlp import SwiGLU
    from mortise.layers.router import GroupedSigmoidRouter

ACCEPTED_UNQUANTISED: Final[Mapping[torch.dtype, tuple[DispatchDtype, ...]]] = MappingProxyType(
    {torch.float32: (DispatchDtype.FP32,), torch.bfloat16: (DispatchDtype.BF16,)}
)
"""Formats that experts of scheme ``FLOAT`` can consume."""


class RoutedExperts(nn.Module):
    """The stored weights of a layer's experts.

    ``w13`` ``[E, 2I, H]``, gate before up, and ``w2`` ``[E, H, I]``.
    """

    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.w13 = nn.Parameter(torch.empty(num_experts, 2 * intermediate_size, hidden_size))
        self.w2 = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))

    def record(self, layer: str) -> ExpertWeights:
        """The weights as the hooks take them."""
        num_experts, hidden_size, intermediate_size = self.w2.shape
        return ExpertWeights(
            layer=layer,
            w13=StoredWeight(scheme=WeightScheme.FLOAT, weight=self.w13),
            w2=StoredWeight(scheme=WeightScheme.FLOAT, weight=self.w2),
            num_local_experts=num_experts,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
        )


class MoELayer(nn.Module):
    """Router, exchange, routed experts and shared experts.

    Args:
        name: dotted module name, shown in decisions and errors.
        ops: the bound hooks of this model's role.
        router: chooses the experts of each token.
        override: the user's explicit dispatch format for this role, or None.
    """

    def __init__(
        self,
        *,
        name: str,
        ops: Ops,
        router: GroupedSigmoidRouter,
        experts: RoutedExperts,
        shared_experts: SwiGLU | None,
        override: Override | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        self.ops = ops
        self.override = override
        self.gate = router
        self.experts = experts
        self.shared_experts = shared_experts
        self.decision: DispatchDecision | None = None
        self._weights: ExpertWeights | None = None
        self._dispatcher: TokenDispatcher | None = None

    def finish_loading(self) -> DispatchDecision:
        """Decide the dispatch format and lay the weights out; again after every weight update.

        Raises:
            BackendUnusableError: the backend says that it cannot serve this layer.
            ConfigError: the user asked for a format that the experts cannot consume.
        """
        weights = self.experts.record(self.name)
        self._require_support(weights)
        self.decision = self.ops.resolve_dispatch_dtype(self._dispatch_request(weights))
        self._weights = self.ops.prepare_expert_weights(weights, self.decision)
        self._dispatcher = self._make_dispatcher(weights)
        return self.decision

    def _require_support(self, weights: ExpertWeights) -> None:
        support = self.ops.supports(
            ExpertLayerRequest(
                role=self.ops.role,
                layer=self.name,
                scheme_w13=weights.w13.scheme,
                scheme_w2=weights.w2.scheme,
                num_experts=weights.num_local_experts,
                num_experts_per_tok=self.gate.num_experts_per_tok,
                hidden_size=weights.hidden_size,
                intermediate_size=weights.intermediate_size,
                compute_dtype=weights.w13.weight.dtype,
            )
        )
        if not support.ok:
            raise BackendUnusableError(
                f"layer {self.name}: {support.reason}",
                reason=ReasonCode.REQUEST_UNSUPPORTED,
                details=[f"backend {self.ops.backend}"],
                remedy="use a backend that serves these experts, or the reference",
            )

    def _dispatch_request(self, weights: ExpertWeights) -> DispatchRequest:
        return DispatchRequest(
            role=self.ops.role,
            layer=self.name,
            mode=DispatchMode.NORMAL,
            override=self.override,
            scheme_w13=weights.w13.scheme,
            scheme_w2=weights.w2.scheme,
            accepted=ACCEPTED_UNQUANTISED[weights.w13.weight.dtype],
            compute_dtype=weights.w13.weight.dtype,
        )

    def _make_dispatcher(self, weights: ExpertWeights) -> TokenDispatcher:
        dispatcher = self.ops.create_token_dispatcher(
            TokenDispatcherRequest(
                role=self.ops.role,
                layer=self.name,
                num_experts=weights.num_local_experts,
                num_experts_per_tok=self.gate.num_experts_per_tok,
                hidden_size=weights.hidden_size,
            )
        )
        if isinstance(dispatcher, NotSupported):
            raise ContractError(
                f"layer {self.name}: no token dispatcher for one process",
                reason=ReasonCode.REQUEST_UNSUPPORTED,
                remedy="use a backend that serves one process, or the reference",
            )
        return dispatcher

    def forward(self, hidden_TH: torch.Tensor) -> torch.Tensor:
        """``[T, H]`` to ``[T, H]``: routed plus shared experts."""
        assert self.decision is not None and self._weights is not None, "finish_loading comes first"
        assert self._dispatcher is not None
        routing = self.gate(hidden_TH)
        tokens, handle = self._dispatcher.dispatch(hidden_TH, routing, self.decision.format)
        rows = self.ops.quantized_moe_apply(tokens, self._weights, hidden_TH.dtype)
        routed_TH = self._dispatcher.combine(rows, handle)
        if self.shared_experts is None:
            return routed_TH
        shared_TH: torch.Tensor = self.shared_experts(hidden_TH)
        return routed_TH + shared_TH
