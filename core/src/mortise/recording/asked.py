"""What a backend makes of a recorded model before it computes: decisions, weights, schedules."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mortise.errors import BackendUnusableError, ConfigError, ContractError
from mortise.spec.consumer import format_problem
from mortise.spec.experts import ExpertWeights
from mortise.spec.methods import ordinary_method
from mortise.spec.reasons import ReasonCode

if TYPE_CHECKING:
    import torch

    from mortise.backends import Ops
    from mortise.recording.documents import Call
    from mortise.recording.reader import Recording
    from mortise.spec.dispatch import DispatchDecision, DispatchMode, DispatchRequest
    from mortise.spec.paged_mqa import PagedMQAMetadata
    from mortise.spec.weights import LinearWeight, StoredWeight


class NotServedError(Exception):
    """The backend says that it does not serve what was recorded; never leaves a replay."""


class Layers:
    """The layers of one role as a backend takes them, each asked about when it is needed.

    Args:
        recording: what another backend was asked.
        ops: the backend's hooks.
    """

    def __init__(self, recording: Recording, ops: Ops) -> None:
        self._recording = recording
        self._ops = ops
        own = [call for call in recording.calls if call.role == ops.role.value]
        self._asked = {call.layer: call for call in own if call.hook.startswith("supports")}
        self._requests = {
            (call.layer, recording.value(call.arguments["request"]).mode): call
            for call in own
            if call.hook == "resolve_dispatch_dtype"
        }
        self._served: dict[str, Any] = {}
        self._decisions: dict[tuple[str, DispatchMode], DispatchDecision] = {}
        self._experts: dict[str, tuple[int, ExpertWeights]] = {}
        self._linears: dict[str, tuple[int, LinearWeight]] = {}
        self._plan: tuple[int, PagedMQAMetadata] | None = None

    def require_served(self, layer: str) -> Any:
        """The backend's ``Support`` of a layer; None of one that nobody asked about.

        Raises:
            NotServedError: it does not serve it.
        """
        call = self._asked.get(layer)
        if call is None:
            return None
        if layer not in self._served:
            ask = self._ops.supports if call.hook == "supports" else self._ops.supports_linear
            self._served[layer] = ask(self._recording.arguments(call)["request"])
        if not self._served[layer].ok:
            raise NotServedError(f"not served: {self._served[layer].reason}")
        return self._served[layer]

    def decision(self, layer: str, mode: DispatchMode) -> DispatchDecision:
        """In which format this backend sends the tokens of a layer.

        Raises:
            NotServedError: in none that the layer's experts take.
            ContractError: in one that contradicts itself or that they do not take.
        """
        if (layer, mode) not in self._decisions:
            request = self._request(self._requests[layer, mode])
            try:
                found = self._ops.resolve_dispatch_dtype(request)
            except (BackendUnusableError, ConfigError) as error:
                raise NotServedError(f"not served: {error.what}") from None
            _require_legal(found, request)
            self._decisions[layer, mode] = found
        return self._decisions[layer, mode]

    def _request(self, call: Call) -> DispatchRequest:
        """As it was recorded, with the expert method of this backend in place of the other's."""
        request: DispatchRequest = self._recording.arguments(call)["request"]
        support = self.require_served(call.layer)
        if support is None:
            return request
        asked = self._recording.arguments(self._asked[call.layer])["request"]
        method = support.method or ordinary_method(
            asked.scheme_w13, asked.compute_dtype, static_input=asked.static_input
        )
        return replace(
            request,
            accepted=method.accepted,
            requested=method.requested,
            requested_in_mode=method.requested_in_mode.get(request.mode),
            runner=method.runner,
            runner_quantises=method.runner_quantises,
        )

    def experts(self, number: int) -> ExpertWeights:
        """Experts prepared from what a call was given; the latest of each layer are kept.

        Args:
            number: of the call that holds the stored weights.
        """
        call = self._recording.call(number)
        kept = self._experts.get(call.layer)
        if kept is None or kept[0] != number:
            self.require_served(call.layer)
            self._experts[call.layer] = kept = (number, self._prepared(call))
        return kept[1]

    def _prepared(self, call: Call) -> ExpertWeights:
        given = self._recording.arguments(call)
        experts = ExpertWeights(
            layer=call.layer,
            w13=_moved(given["w13"], self._ops.capabilities.device),
            w2=_moved(given["w2"], self._ops.capabilities.device),
            num_local_experts=given["num_local_experts"],
            hidden_size=given["hidden_size"],
            intermediate_size=given["intermediate_size"],
        )
        for layer, mode in self._requests:
            if layer == call.layer:
                experts = self._ops.prepare_expert_weights(experts, self.decision(layer, mode))
        return experts

    def linear(self, number: int) -> LinearWeight:
        """As :meth:`experts`, of a projection."""
        call = self._recording.call(number)
        kept = self._linears.get(call.layer)
        if kept is None or kept[0] != number:
            self.require_served(call.layer)
            device = self._ops.capabilities.device
            found: LinearWeight = self._recording.arguments(call)["linear"]
            bias = None if found.bias is None else found.bias.to(device)
            moved = replace(found, stored=_moved(found.stored, device), bias=bias)
            self._linears[call.layer] = kept = (number, self._ops.prepare_linear_weight(moved))
        return kept[1]

    def plan(self, number: int) -> PagedMQAMetadata:
        """The schedule for the lengths that a call was given; the latest is kept.

        Raises:
            NotServedError: the backend has no such pages, or takes no such rows.
        """
        if self._plan is None or self._plan[0] != number:
            given = self._recording.arguments(self._recording.call(number))
            facts, lens = self._ops.capabilities, given["context_lens"]
            if given["block_size"] not in facts.page_sizes:
                raise NotServedError(f"not served: pages of {given['block_size']} tokens")
            if lens.shape[1] > facts.max_native_next_n:
                raise NotServedError(f"not served: {lens.shape[1]} tokens in one row")
            plan = self._ops.paged_mqa_metadata(
                lens.to(facts.device), given["block_size"], facts.num_workers, given["mode"]
            )
            self._plan = (number, plan)
        return self._plan[1]


def _moved(stored: StoredWeight, device: torch.device) -> StoredWeight:
    def there(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor.to(device)

    return replace(
        stored,
        weight=stored.weight.to(device),
        scale=there(stored.scale),
        global_scale=there(stored.global_scale),
        input_scale=there(stored.input_scale),
        input_offset=there(stored.input_offset),
    )


def _require_legal(found: DispatchDecision, request: DispatchRequest) -> None:
    if found.format.dtype not in request.accepted:
        raise ContractError(
            f"the decision is {found.format.dtype.value}, which the experts do not take",
            reason=ReasonCode.CONTRACT_BROKEN,
            expected=f"one of {', '.join(request.accepted)}",
        )
    if problem := format_problem(found.format):
        raise ContractError(problem[0], reason=ReasonCode.CONTRACT_BROKEN, expected=problem[1])
