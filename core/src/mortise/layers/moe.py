"""A layer of routed and shared experts, whose only way out of the core is the bound hooks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from mortise.errors import BackendUnusableError
from mortise.layers.linear import stored_placements
from mortise.layers.stored_tensors import StoredTensors
from mortise.parallel.collectives import all_reduce_max_float
from mortise.parallel.portable import create_portable_dispatcher
from mortise.spec.capabilities import ExpertLayerRequest, ExpertMethod
from mortise.spec.dispatch import (
    DispatchDecision,
    DispatchMode,
    DispatchRequest,
    TokenDispatcher,
    TokenDispatcherRequest,
)
from mortise.spec.experts import ExpertWeights
from mortise.spec.hooks import NotSupported
from mortise.spec.methods import ordinary_method
from mortise.spec.reasons import ReasonCode
from mortise.spec.weights import WeightScheme

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from mortise.checkpoint.placement import Placement
    from mortise.layers.context import LayerContext
    from mortise.layers.mlp import SwiGLU
    from mortise.layers.router import GroupedSigmoidRouter, SoftmaxRouter
    from mortise.layers.shared_expert import GatedSharedExpert
    from mortise.spec.dispatch import DispatchFormat


class RoutedExperts(nn.Module):
    """The stored weights of this rank's share of a layer's experts.

    ``w13`` ``[E_l, 2I, H]``, gate before up, and ``w2`` ``[E_l, H, I]``; rank r of G holds the r-th
    of G equal parts of the experts.

    Args:
        context: where the model is built.
        name: dotted name of the experts in the checkpoint (``model.layers.3.mlp.experts``).
        num_experts: of all ranks.
        hidden_size, intermediate_size: H and I.

    Raises:
        QuantizationConfigError: the experts are not all stored in the same scheme.
    """

    def __init__(
        self,
        context: LayerContext,
        name: str,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
    ) -> None:
        super().__init__()
        self._schemes = context.schemes
        self._name = name
        self.num_experts = num_experts
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.local = context.group.share(num_experts)
        every = range(num_experts)
        w13 = context.schemes.common_scheme([module for e in every for module in self._gate_up(e)])
        w2 = context.schemes.common_scheme([module for e in every for module in self._down(e)])
        self.w13 = StoredTensors(
            w13,
            2 * intermediate_size,
            hidden_size,
            num_parts=2,
            num_experts=len(self.local),
            module=self._gate_up(0)[0],
        )
        self.w2 = StoredTensors(
            w2,
            hidden_size,
            intermediate_size,
            num_experts=len(self.local),
            module=self._down(0)[0],
        )

    def placements(self) -> Iterator[Placement]:
        """Where the tensors of this rank's experts go."""
        for place, expert in enumerate(self.local):
            yield from stored_placements(self._schemes, self._gate_up(expert), self.w13, place)
            yield from stored_placements(self._schemes, self._down(expert), self.w2, place)

    def record(self, layer: str) -> ExpertWeights:
        """The weights as the hooks take them."""
        return ExpertWeights(
            layer=layer,
            w13=self.w13.record(),
            w2=self.w2.record(),
            num_local_experts=len(self.local),
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
        )

    def _gate_up(self, expert: int) -> tuple[str, str]:
        return f"{self._name}.{expert}.gate_proj", f"{self._name}.{expert}.up_proj"

    def _down(self, expert: int) -> tuple[str]:
        return (f"{self._name}.{expert}.down_proj",)


@dataclass(frozen=True, slots=True)
class Exchange:
    """How the tokens of one mode travel: what was decided, and who carries them."""

    decision: DispatchDecision
    dispatcher: TokenDispatcher


class MoELayer(nn.Module):
    """Router, exchange, routed experts and shared experts.

    Args:
        context: where the model is built.
        name: dotted module name, shown in decisions and errors.
        router: chooses the experts of each token.
    """

    def __init__(
        self,
        context: LayerContext,
        name: str,
        *,
        router: GroupedSigmoidRouter | SoftmaxRouter,
        experts: RoutedExperts,
        shared_experts: SwiGLU | GatedSharedExpert | None,
    ) -> None:
        super().__init__()
        self.name = name
        self.context = context
        self.gate = router
        self.experts = experts
        self.shared_experts = shared_experts
        # What the backend says that it runs the experts by; nothing until they are loaded.
        self.runner = ""
        self._weights: ExpertWeights | None = None
        self._exchanges: Mapping[DispatchMode, Exchange] = {}

    @property
    def decisions(self) -> tuple[DispatchDecision, ...]:
        """What was decided, one for each mode."""
        return tuple(exchange.decision for exchange in self._exchanges.values())

    @property
    def weights(self) -> ExpertWeights:
        """This rank's experts, prepared."""
        assert self._weights is not None, "finish_loading comes first"
        return self._weights

    def finish_loading(self, compute_dtype: torch.dtype) -> tuple[DispatchDecision, ...]:
        """Decide the dispatch formats and lay the weights out; again after every weight update.

        Args:
            compute_dtype: dtype of the hidden state.

        Raises:
            BackendUnusableError: the backend says that it cannot serve this layer.
            ConfigError: the user asked for a format that the experts cannot consume.
        """
        ops = self.context.ops
        weights = self.experts.record(self.name)
        method = self._method(weights, compute_dtype)
        self.runner = method.runner
        decisions = {
            mode: ops.resolve_dispatch_dtype(self._request(mode, weights, method, compute_dtype))
            for mode in self.context.modes
        }
        # Preparing what is prepared changes nothing, so every mode has its say.
        for decision in decisions.values():
            weights = ops.prepare_expert_weights(weights, decision)
        self._exchanges = {
            mode: Exchange(decision, self._dispatcher(mode, decision.format))
            for mode, decision in decisions.items()
        }
        self._weights = weights
        return self.decisions

    def _method(self, weights: ExpertWeights, compute_dtype: torch.dtype) -> ExpertMethod:
        ops = self.context.ops
        static_input = weights.w13.input_scale is not None
        support = ops.supports(
            ExpertLayerRequest(
                role=ops.role,
                layer=self.name,
                scheme_w13=weights.w13.scheme,
                scheme_w2=weights.w2.scheme,
                num_experts=self.experts.num_experts,
                num_experts_per_tok=self.gate.num_experts_per_tok,
                hidden_size=weights.hidden_size,
                intermediate_size=weights.intermediate_size,
                compute_dtype=compute_dtype,
                num_local_experts=weights.num_local_experts,
                static_input=static_input,
                num_groups_w13=self.experts.w13.num_groups,
                num_groups_w2=self.experts.w2.num_groups,
            )
        )
        if not support.ok:
            raise BackendUnusableError(
                f"layer {self.name}: {support.reason}",
                reason=ReasonCode.REQUEST_UNSUPPORTED,
                details=[f"backend {ops.backend}"],
                remedy="use a backend that serves these experts, or the reference",
            )
        if support.method is not None:
            return support.method
        return ordinary_method(weights.w13.scheme, compute_dtype, static_input=static_input)

    def _request(
        self,
        mode: DispatchMode,
        weights: ExpertWeights,
        method: ExpertMethod,
        compute_dtype: torch.dtype,
    ) -> DispatchRequest:
        stored = weights.w13
        is_block = stored.scheme is WeightScheme.FP8_BLOCK
        return DispatchRequest(
            role=self.context.ops.role,
            layer=self.name,
            mode=mode,
            override=self.context.overrides.get(mode),
            scheme_w13=stored.scheme,
            scheme_w2=weights.w2.scheme,
            accepted=method.accepted,
            requested_in_mode=method.requested_in_mode.get(mode),
            requested=method.requested,
            input_global_scale=self._input_global_scale(weights),
            scale_format=stored.scale_format if is_block else None,
            runner=method.runner,
            runner_quantises=method.runner_quantises,
            compute_dtype=compute_dtype,
        )

    def _input_global_scale(self, weights: ExpertWeights) -> float | None:
        """One for all experts of all ranks, since a row is quantised before it meets any of them.

        The largest: under a smaller one the rows of another expert would saturate.
        """
        stored = weights.w13
        if stored.scheme is not WeightScheme.NVFP4 or stored.input_scale is None:
            return None
        return all_reduce_max_float(self.context.group, float(stored.input_scale.max()))

    def _dispatcher(self, mode: DispatchMode, format: DispatchFormat) -> TokenDispatcher:
        """The device's own exchange where it has one, else the portable one."""
        group = self.context.group
        request = TokenDispatcherRequest(
            role=self.context.ops.role,
            layer=self.name,
            num_experts=self.experts.num_experts,
            num_experts_per_tok=self.gate.num_experts_per_tok,
            hidden_size=self.experts.hidden_size,
            world_size=group.world_size,
            rank=group.rank,
            mode=mode,
            max_tokens_per_rank=self.context.max_tokens_per_rank,
            two_stage=self.shared_experts is not None,
            format=format,
            process_group=group.process_group,
        )
        dispatcher = self.context.ops.create_token_dispatcher(request)
        if isinstance(dispatcher, NotSupported):
            return create_portable_dispatcher(request, group)
        return dispatcher

    def forward(
        self, hidden_TH: torch.Tensor, mode: DispatchMode = DispatchMode.NORMAL
    ) -> torch.Tensor:
        """``[T, H]`` to ``[T, H]``: routed plus shared experts."""
        assert self._weights is not None, "finish_loading comes first"
        exchange = self._exchanges[mode]
        routing = self.gate(hidden_TH)
        tokens, handle = exchange.dispatcher.dispatch(hidden_TH, routing, exchange.decision.format)
        # Between the two stages of the exchange, while the rows are on their way.
        shared_TH = None if self.shared_experts is None else self.shared_experts(hidden_TH)
        if tokens.receive is not None:
            tokens.receive()
        rows = self.context.ops.quantized_moe_apply(tokens, self._weights, hidden_TH.dtype)
        routed_TH = exchange.dispatcher.combine(rows, handle)
        return routed_TH if shared_TH is None else routed_TH + shared_TH
