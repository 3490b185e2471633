"""A backend's own dispatchers, asked to send and bring back what was recorded."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import torch

from mortise.recording import allowances
from mortise.recording.asked import NotServedError
from mortise.recording.compared import judged
from mortise.recording.differences import difference
from mortise.recording.outcome import Outcome, Verdict
from mortise.recording.rows import PlainRows, row_places, spread
from mortise.spec.dispatch import (
    DispatchedTokens,
    DispatchMode,
    Routing,
    RowLayout,
)
from mortise.spec.hooks import NotSupported

if TYPE_CHECKING:
    from mortise.backends import Ops
    from mortise.recording.asked import Layers
    from mortise.recording.documents import Call
    from mortise.recording.reader import Recording
    from mortise.spec.dispatch import DispatchFormat, DispatchHandle, TokenDispatcher

CORE_EXCHANGE: Final = "not served: it leaves the exchange to the core's portable one"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """What a dispatch of this backend gave, beside the recorded one.

    Args:
        dispatcher, handle, tokens: this backend's.
        plain: its rows, packed.
        order: int64 ``[R]``, the recorded row that each of them is.
        recorded: the recorded rows, float32 ``[R, H]``.
        format: of the recorded rows.
        same_side: whether both multiply by the routing weights at the same time.
    """

    dispatcher: TokenDispatcher
    handle: DispatchHandle
    tokens: DispatchedTokens
    plain: PlainRows
    order: torch.Tensor
    recorded: torch.Tensor
    format: DispatchFormat
    same_side: bool


class Exchanges:
    """The dispatchers of one role.

    Args:
        recording: what another backend's were asked.
        ops: this backend's hooks.
        layers: what it makes of the layers.
    """

    def __init__(self, recording: Recording, ops: Ops, layers: Layers) -> None:
        self._recording = recording
        self._ops = ops
        self._layers = layers
        self._made: dict[int, TokenDispatcher | None] = {}
        self._sent: tuple[int, Sent] | None = None

    def created(self, call: Call) -> Outcome:
        """Whether there is a dispatcher is each backend's own matter."""
        own = self._dispatcher(call.number) is not None
        if own is bool(call.answer):
            return Outcome(call=call, verdict=Verdict.SAME)
        whose = "an exchange of its own" if own else "the core's portable exchange"
        return Outcome(call=call, verdict=Verdict.DIFFERS, note=whose)

    def dispatched(self, call: Call, given: dict[str, Any]) -> Outcome:
        """The rows of each expert, in the order in which they were recorded."""
        sent = self._send(call, given)
        recorded_counts = self._recording.value(call.answer)["counts"]
        if sent.plain.counts != recorded_counts:
            note = f"rows of each expert: {list(sent.plain.counts)}, not {list(recorded_counts)}"
            return Outcome(call=call, verdict=Verdict.DIVERGENT, note=note)
        found = sent.plain.floats(sent.tokens.format)
        allowance = allowances.of_rows(sent.tokens.format, sent.format)
        expected = sent.recorded[sent.order]
        return judged(call, "the dispatched rows", expected, found.cpu(), allowance)

    def combined(self, call: Call, given: dict[str, Any]) -> Outcome:
        """The recorded rows of the experts, brought home by this backend."""
        sent = self._sent_by(call.uses)
        if not sent.same_side:
            raise NotServedError("not served: the routing weights are multiplied elsewhere")
        device = self._ops.capabilities.device
        places = row_places(sent.plain.counts, sent.tokens.format, sent.tokens.rows.shape)
        is_masked = sent.tokens.format.row_layout is RowLayout.MASKED
        shape = tuple(sent.tokens.rows.shape[: 2 if is_masked else 1])
        rows = spread(given["rows"][sent.order].to(device), places, shape)
        found = sent.dispatcher.combine(rows, sent.handle)
        recorded = self._recording.value(call.answer)
        allowance = allowances.of_sums(recorded.dtype)
        return judged(call, "the sums", recorded, found.cpu(), allowance)

    def _dispatcher(self, number: int) -> TokenDispatcher | None:
        if number not in self._made:
            call = self._recording.call(number)
            self._layers.require_served(call.layer)
            request = self._recording.arguments(call)["request"]
            if request.world_size != 1:
                raise NotServedError("not served: an exchange between processes")
            own = self._layers.decision(call.layer, request.mode).format
            made = self._ops.create_token_dispatcher(replace(request, format=own))
            self._made[number] = None if isinstance(made, NotSupported) else made
        return self._made[number]

    def _sent_by(self, number: int) -> Sent:
        if self._sent is None or self._sent[0] != number:
            call = self._recording.call(number)
            self._send(call, self._recording.arguments(call))
        assert self._sent is not None
        return self._sent[1]

    def _send(self, call: Call, given: dict[str, Any]) -> Sent:
        dispatcher = self._dispatcher(call.uses)
        if dispatcher is None:
            raise NotServedError(CORE_EXCHANGE)
        device = self._ops.capabilities.device
        mode: DispatchMode = given["format"].mode
        own = self._layers.decision(call.layer, mode).format
        routing = Routing(
            topk_ids=given["topk_ids"].to(device), topk_weights=given["topk_weights"].to(device)
        )
        tokens, handle = dispatcher.dispatch(given["hidden"].to(device), routing, own)
        if tokens.receive is not None:
            tokens.receive()
        plain = PlainRows.of(tokens)
        answer = self._recording.value(call.answer)
        recorded = _recorded_rows(answer, plain)
        sent = Sent(
            dispatcher=dispatcher,
            handle=handle,
            tokens=tokens,
            plain=plain,
            order=_order(plain.floats(tokens.format).cpu(), recorded, plain.counts),
            recorded=recorded,
            format=answer["format"],
            same_side=answer["side"] is tokens.routing_weight_side,
        )
        self._sent = (call.number, sent)
        return sent


def _recorded_rows(answer: dict[str, Any], like: PlainRows) -> torch.Tensor:
    return replace(like, rows=answer["rows"], scales=answer["scales"]).floats(answer["format"])


_SURELY_THE_SAME_ROW: Final = 0.5
"""Further than any format rounds a row, and nearer than another token's row is."""


def _order(found: torch.Tensor, recorded: torch.Tensor, counts: tuple[int, ...]) -> torch.Tensor:
    """The recorded row that each row is: the contract orders groups, and no rows within one."""
    as_recorded = torch.arange(len(found))
    if found.shape != recorded.shape or _are_the_same(found, recorded):
        return as_recorded
    order, start = as_recorded.clone(), 0
    for count in counts:
        own = slice(start, start + count)
        start += count
        if count:
            apart = torch.cdist(found[own].nan_to_num(), recorded[own].nan_to_num())
            order[own] = own.start + apart.argmin(dim=1)
    # An order that leaves a row unexplained explains nothing: the row is wrong, not its place.
    is_one_to_one = len(order.unique()) == len(order)
    return order if is_one_to_one and _are_the_same(found, recorded[order]) else as_recorded


def _are_the_same(found: torch.Tensor, recorded: torch.Tensor) -> bool:
    return difference(found, recorded).row < _SURELY_THE_SAME_ROW
