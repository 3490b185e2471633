"""Laws that hold of a whole layer whatever its numbers are, and of two models side by side."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mortise.conformance.comparison import require_close, require_same
from mortise.conformance.draws import draw_rows
from mortise.conformance.expert_cases import (
    LAYER,
    NUM_EXPERTS,
    USUAL_COUNTS,
    ExpertCase,
    Layer,
    draw_tokens,
    layer_of,
    plain_layers,
    prepared,
)
from mortise.conformance.records import Check, FaultError, Level, Measured, NotAskedError
from mortise.plugin import (
    NOT_SUPPORTED,
    DispatchMode,
    ModelRole,
    Routing,
    StoredWeight,
    TokenDispatcherRequest,
)
from mortise.reference.dispatch import LocalDispatcher
from mortise.testing.poison import defined_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from mortise.conformance.subject import Subject
    from mortise.plugin import Capabilities, DispatchedTokens

HOOK: Final = "quantized_moe_apply"
TOKENS: Final = 9


def _routing(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Two different experts of each token, and their weights."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(TOKENS, NUM_EXPERTS, generator=generator)
    weights = 0.2 + torch.rand(TOKENS, 2, generator=generator)
    return scores.topk(2, dim=1).indices, weights


def _run(
    subject: Subject, layer: Layer, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Dispatch, experts, combine; by the backend's own exchange where it has one."""
    case, stated = layer.case, layer.arrivals[0].format
    dispatcher = subject.ops.create_token_dispatcher(
        TokenDispatcherRequest(
            role=ModelRole.MAIN,
            layer=LAYER,
            num_experts=NUM_EXPERTS,
            num_experts_per_tok=ids.shape[1],
            hidden_size=case.hidden,
            mode=stated.mode,
            format=stated,
        )
    )
    if dispatcher is NOT_SUPPORTED:
        dispatcher = LocalDispatcher(NUM_EXPERTS, layer=LAYER)
    routing = Routing(topk_ids=subject.there(ids), topk_weights=subject.there(weights))
    tokens, handle = dispatcher.dispatch(subject.there(hidden), routing, stated)
    rows = subject.ops.quantized_moe_apply(tokens, layer.own, case.dtype)
    return dispatcher.combine(rows, handle).cpu()


def _hidden(case: ExpertCase) -> torch.Tensor:
    return draw_rows(TOKENS, case.hidden, case.dtype, seed=3)


def _close(case: ExpertCase, found: torch.Tensor, expected: torch.Tensor, law: str) -> Measured:
    return require_close(
        found, expected, case.tolerance(TOKENS), subject=case.subject, case=f"{case}: {law}"
    )


def permuted_tokens_give_permuted_results(subject: Subject, case: ExpertCase) -> Measured:
    """A layer treats each token alone: in another order the same results come in that order."""
    layer, hidden = layer_of(subject, case), _hidden(case)
    ids, weights = _routing()
    order = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(1))
    expected = _run(subject, layer, hidden, ids, weights)[order]
    found = _run(subject, layer, hidden[order], ids[order], weights[order])
    return _close(case, found, expected, "tokens in another order")


def two_batches_give_what_one_gives(subject: Subject, case: ExpertCase) -> Measured:
    """A token's result does not depend on which tokens are beside it."""
    layer, hidden = layer_of(subject, case), _hidden(case)
    ids, weights = _routing()
    expected = _run(subject, layer, hidden, ids, weights)
    parts = [
        _run(subject, layer, hidden[part], ids[part], weights[part])
        for part in (slice(0, 4), slice(4, TOKENS))
    ]
    return _close(case, torch.cat(parts), expected, "two batches instead of one")


def a_routing_weight_of_zero_adds_nothing(subject: Subject, case: ExpertCase) -> Measured:
    """A choice of weight zero is as good as no choice."""
    layer, hidden = layer_of(subject, case), _hidden(case)
    ids, weights = _routing()
    weights[::2, 1] = 0.0
    without = ids.clone()
    without[::2, 1] = -1
    expected = _run(subject, layer, hidden, without, weights)
    found = _run(subject, layer, hidden, ids, weights)
    return _close(case, found, expected, "a routing weight of zero")


def an_expert_twice_with_half_the_weight_is_the_expert(
    subject: Subject, case: ExpertCase
) -> Measured:
    """Two equal experts that share a routing weight give what one of them gives with all of it."""
    layer, hidden = layer_of(subject, case), _hidden(case)
    doubled = replace(
        layer.stored, w13=_first_twice(layer.stored.w13), w2=_first_twice(layer.stored.w2)
    )
    twins = replace(layer, own=prepared(subject, doubled, layer.arrivals[0]))
    both = torch.tensor([[0, 1]]).expand(TOKENS, 2)
    alone = torch.tensor([[0, -1]]).expand(TOKENS, 2)
    halves, whole = torch.full((TOKENS, 2), 0.4), torch.full((TOKENS, 2), 0.8)
    expected = _run(subject, twins, hidden, alone.contiguous(), whole)
    found = _run(subject, twins, hidden, both.contiguous(), halves)
    return _close(case, found, expected, "an expert twice with half its weight")


def _first_twice(stored: StoredWeight) -> StoredWeight:
    def doubled(tensor: torch.Tensor) -> torch.Tensor:
        copy = tensor.clone()
        copy.unsqueeze(-1).view(torch.uint8)[1] = tensor.unsqueeze(-1).view(torch.uint8)[0]
        return copy

    def part(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else doubled(tensor)

    return replace(
        stored,
        weight=doubled(stored.weight),
        scale=part(stored.scale),
        global_scale=part(stored.global_scale),
        input_scale=part(stored.input_scale),
        input_offset=part(stored.input_offset),
    )


def interleaved_roles_give_what_each_gives_alone(subject: Subject, case: ExpertCase) -> None:
    """Two models of other weights and another scheme, bound, prepared and run in turns in either
    order, give bit by bit what each gives alone.
    """
    other = _other_case(subject, case)
    ways = ((case, other), (other, case))
    alone = {one: _alone(subject, one) for one in ways[0]}
    for first, second in ways:
        found = _interleaved(subject, first, second)
        for one in (first, second):
            require_same(
                alone[one],
                found[one],
                f"process-wide state: two models in turns differ from each alone ({first} before"
                f" {second}; results of {one})",
            )


def _other_case(subject: Subject, case: ExpertCase) -> ExpertCase:
    """Another layer that it serves, or the same one with other sizes."""
    for other in plain_layers(subject.capabilities):
        if other.w13 != case.w13 and subject.ops.supports(other.request).ok:
            return other
    return replace(case, hidden=160, intermediate=96)


def _steps(subject: Subject, case: ExpertCase, role: ModelRole) -> list[Callable[[], object]]:
    """Bind, prepare, run: one after the other, with what another model does in between."""
    at: dict[str, Layer] = {}
    own = subject.with_binding(role)
    results: list[torch.Tensor] = []

    def prepare() -> None:
        at["layer"] = layer_of(own, case)

    def run() -> None:
        layer = at["layer"]
        tokens = draw_tokens(USUAL_COUNTS, case.hidden, case.dtype, layer.arrivals[0].format)
        results.append(layer.found(own, tokens))

    return [prepare, run, run, lambda: torch.cat(results)]


def _alone(subject: Subject, case: ExpertCase) -> torch.Tensor:
    *steps, result = _steps(subject, case, ModelRole.MAIN)
    for step in steps:
        step()
    found = result()
    assert isinstance(found, torch.Tensor)
    return found


def _interleaved(
    subject: Subject, first: ExpertCase, second: ExpertCase
) -> dict[ExpertCase, torch.Tensor]:
    both = (
        (first, _steps(subject, first, ModelRole.MAIN)),
        (second, _steps(subject, second, ModelRole.DRAFT)),
    )
    found: dict[ExpertCase, torch.Tensor] = {}
    for turn in range(4):
        for case, steps in both:
            answer = steps[turn]()
            if isinstance(answer, torch.Tensor):
                found[case] = answer
    return found


class _Travels(TorchDispatchMode):
    """Notes every operator that makes a tensor on a device other than one."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device = device
        self.seen: list[str] = []

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> object:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.device.type != self.device.type:
            self.seen.append(f"{func} to {result.device}")
        return result


def kernels_stay_on_their_device(subject: Subject, case: ExpertCase) -> None:
    """No operator of torch within the hook makes a tensor on another device than the rows'."""
    layer = layer_of(subject, case)
    tokens = subject.there(
        draw_tokens(USUAL_COUNTS, case.hidden, case.dtype, layer.arrivals[0].format)
    )
    subject.ops.quantized_moe_apply(tokens, layer.own, case.dtype)
    travels = _Travels(subject.capabilities.device)
    with travels:
        subject.ops.quantized_moe_apply(tokens, layer.own, case.dtype)
    if travels.seen:
        raise FaultError(
            f"{HOOK} silently copies to another device than {subject.capabilities.device}:"
            f" {', '.join(sorted(set(travels.seen)))}\ncase: {case}"
        )


def captured_experts_are_replayed(subject: Subject, case: ExpertCase) -> Measured:
    """Where capabilities claim ``graph_capture``, low-latency rows are computed within a graph of
    the device, and a replay on new rows gives the results of those.
    """
    if subject.capabilities.device.type == "cpu":
        raise NotAskedError("NOT CAPTURED: a graph needs a device, and tensors are on the CPU here")
    layer = layer_of(subject, case)
    formats = (one.format for one in layer.arrivals)
    stated = next((one for one in formats if one.mode is DispatchMode.LOW_LATENCY), None)
    if stated is None:
        raise NotAskedError("NOT CAPTURED: it has no low-latency rows, whose counts stay there")
    first, second = (
        draw_tokens(USUAL_COUNTS, case.hidden, case.dtype, stated, seed=seed, host_counts=False)
        for seed in (1, 2)
    )
    found = _replayed(subject, layer, subject.there(first), subject.there(second))
    defined = defined_rows(second)
    return require_close(
        found.cpu()[defined],
        layer.expected(subject, second),
        case.tolerance(int(defined.sum())),
        subject=case.subject,
        case=f"{case}: a replay on new rows",
    )


def _replayed(
    subject: Subject, layer: Layer, tokens: DispatchedTokens, new: DispatchedTokens
) -> torch.Tensor:
    """Capture with some rows, write others in their place, replay."""
    make_graph = getattr(torch.accelerator, "Graph", None)
    if make_graph is None:
        raise NotAskedError("NOT CAPTURED: this torch has no graphs of its own")
    apply, dtype = subject.ops.quantized_moe_apply, layer.case.dtype
    apply(tokens, layer.own, dtype)
    torch.accelerator.synchronize()
    graph = make_graph()
    with graph:
        found = apply(tokens, layer.own, dtype)
    for old, fresh in ((tokens.rows, new.rows), (tokens.scales, new.scales)):
        if old is not None and fresh is not None:
            old.unsqueeze(-1).view(torch.uint8).copy_(fresh.unsqueeze(-1).view(torch.uint8))
    graph.replay()
    torch.accelerator.synchronize()
    return found


def captured_layers(capabilities: Capabilities) -> Iterator[ExpertCase]:
    """Layers of a backend that claims it."""
    if capabilities.graph_capture:
        yield from plain_layers(capabilities)


def _check(run: object) -> Check:
    return Check(run=run, level=Level.DEVICE, hook=HOOK, cases=plain_layers)  # type: ignore[arg-type]


CHECKS: Final = (
    _check(permuted_tokens_give_permuted_results),
    _check(two_batches_give_what_one_gives),
    _check(a_routing_weight_of_zero_adds_nothing),
    _check(an_expert_twice_with_half_the_weight_is_the_expert),
    _check(interleaved_roles_give_what_each_gives_alone),
    _check(kernels_stay_on_their_device),
    Check(run=captured_experts_are_replayed, level=Level.DEVICE, hook=HOOK, cases=captured_layers),
)
