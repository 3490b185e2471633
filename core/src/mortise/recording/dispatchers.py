"""A backend's own dispatcher whose calls are kept, as steps of the hook that made it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mortise.recording.rows import PlainRows, counts_of, packed, row_places

if TYPE_CHECKING:
    import torch

    from mortise.recording.recorder import Recorder
    from mortise.spec.dispatch import (
        DispatchedTokens,
        DispatchFormat,
        DispatchHandle,
        Routing,
        TokenDispatcher,
        TokenDispatcherRequest,
    )

DISPATCH, COMBINE = "dispatch", "combine"
"""What the two steps are called in a recording, in the place of a hook's name."""


class RecordedHandle:
    """The backend's handle, beside the tokens that it came with and the call that gave it."""

    def __init__(
        self, handle: DispatchHandle, tokens: DispatchedTokens, number: int | None
    ) -> None:
        self.handle = handle
        self.tokens = tokens
        self.number = number


class RecordedDispatcher:
    """Sends and brings back as the backend's does, and tells the recorder.

    Of an exchange in two stages the second follows at once, so that what arrived can be read.

    Args:
        recorder: is told.
        dispatcher: the backend's.
        request: what it was made for.
        made_by: number of the call that made it; None if that was not kept.
    """

    def __init__(
        self,
        recorder: Recorder,
        dispatcher: TokenDispatcher,
        request: TokenDispatcherRequest,
        made_by: int | None,
    ) -> None:
        self._recorder = recorder
        self._dispatcher = dispatcher
        self._request = request
        self._made_by = made_by

    def dispatch(
        self, hidden_TH: torch.Tensor, routing: Routing, format: DispatchFormat
    ) -> tuple[DispatchedTokens, DispatchHandle]:
        """Hidden state and routing, and with the rows that arrive the step's answer."""
        recorder, request, number = self._recorder, self._request, self._recorder.begin()
        arguments = None
        tensors = (hidden_TH, routing.topk_ids, routing.topk_weights)
        if recorder.keeps(DISPATCH, request.layer, request.role, tensors, self._made_by):
            given = {
                "hidden": hidden_TH,
                "topk_ids": routing.topk_ids,
                "topk_weights": routing.topk_weights,
                "format": format,
            }
            arguments = {name: recorder.encoded(one) for name, one in given.items()}
        tokens, handle = self._dispatcher.dispatch(hidden_TH, routing, format)
        if arguments is None:
            return tokens, RecordedHandle(handle, tokens, None)
        if tokens.receive is not None:
            tokens.receive()
        plain = PlainRows.of(tokens)
        answer = {
            "format": tokens.format,
            "rows": plain.rows,
            "scales": plain.scales,
            "counts": plain.counts,
            "side": tokens.routing_weight_side,
        }
        kept = recorder.add(
            number,
            DISPATCH,
            request.layer,
            request.role,
            arguments,
            answer,
            uses=self._made_by or 0,
        )
        return tokens, RecordedHandle(handle, tokens, number if kept else None)

    def combine(self, rows_RH: torch.Tensor, handle: DispatchHandle) -> torch.Tensor:
        """The experts' rows, packed, and their sums."""
        assert isinstance(handle, RecordedHandle)
        recorder, request, number = self._recorder, self._request, self._recorder.begin()
        arguments = None
        if recorder.keeps(COMBINE, request.layer, request.role, (rows_RH,), handle.number):
            sent_as = handle.tokens.format
            places = row_places(counts_of(handle.tokens), sent_as, rows_RH.shape)
            arguments = {"rows": recorder.encoded(packed(rows_RH, places, sent_as))}
        answer = self._dispatcher.combine(rows_RH, handle.handle)
        if arguments is not None:
            recorder.add(
                number,
                COMBINE,
                request.layer,
                request.role,
                arguments,
                answer,
                uses=handle.number or 0,
            )
        return answer
