"""Asks a backend what another one was asked, and compares the answers."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from mortise.engine.threads import num_threads
from mortise.errors import MortiseError, RecordingError
from mortise.recording.asked import Layers, NotServedError
from mortise.recording.compared import (
    compared_data,
    compared_experts,
    compared_linear,
    compared_parts,
    compared_plan,
    compared_scores,
)
from mortise.recording.dispatchers import COMBINE, DISPATCH
from mortise.recording.exchanges import Exchanges
from mortise.recording.outcome import Outcome, Report, Verdict
from mortise.spec.roles import ModelRole

if TYPE_CHECKING:
    from collections.abc import Callable

    from mortise.backends import Ops
    from mortise.recording.documents import Call
    from mortise.recording.reader import Recording

    Progress = Callable[[int, int], None]
    """Told the calls that were replayed and all there are."""


class Replayer:
    """One backend's answers to the calls of a recording.

    Args:
        recording: what was asked and answered.
        bind: gives the hooks of a role; called once for each role that the recording has.
    """

    def __init__(self, recording: Recording, bind: Callable[[ModelRole], Ops]) -> None:
        self._recording = recording
        self._ops = {role: bind(ModelRole(role)) for role in recording.header.backends}
        self._layers = {role: Layers(recording, ops) for role, ops in self._ops.items()}
        self._exchanges = {
            role: Exchanges(recording, ops, self._layers[role]) for role, ops in self._ops.items()
        }

    def report(self, progress: Progress | None = None) -> Report:
        """Replay every call, in the order of the run."""
        calls = self._recording.calls
        outcomes = []
        for done, call in enumerate(calls, start=1):
            outcomes.append(replace(self.replay(call), answers=()))
            if progress is not None:
                progress(done, len(calls))
        return Report(outcomes=tuple(outcomes), backend=str(self._main().backend))

    def _main(self) -> Ops:
        if not self._ops:
            raise RecordingError(
                "the recording names no backend, so nothing was asked",
                expected="a recording of a run",
                remedy="record again",
            )
        return next(iter(self._ops.values()))

    def replay(self, call: Call) -> Outcome:
        """Ask one call; what it builds on is asked first, unless it was already."""
        try:
            with torch.inference_mode(), num_threads(self._recording.header.threads):
                return self._replayed(call)
        except NotServedError as error:
            return Outcome(call=call, verdict=Verdict.UNSUPPORTED, note=str(error))
        except RecordingError:
            raise
        except MortiseError as error:
            return _raised(call, type(error).__name__, error.what)
        except Exception as error:
            # Whatever a backend does instead of answering is what is to be reported.
            text = str(error).splitlines()
            return _raised(call, type(error).__name__, text[0] if text else "")

    def _replayed(self, call: Call) -> Outcome:
        ops, layers = self._ops[call.role], self._layers[call.role]
        given = self._recording.arguments(call)
        match call.hook:
            case "supports" | "supports_linear":
                layers.require_served(call.layer)
                return Outcome(call=call, verdict=Verdict.SAME)
            case "resolve_dispatch_dtype":
                found = layers.decision(call.layer, given["request"].mode)
                return compared_data(call, self._recording.value(call.answer), found)
            case "prepare_expert_weights":
                layers.experts(call.uses or call.number)
                return _opaque(call)
            case "prepare_linear_weight":
                layers.linear(call.number)
                return _opaque(call)
            case "create_token_dispatcher":
                return self._exchanges[call.role].created(call)
            case _ if call.hook == DISPATCH:
                return self._exchanges[call.role].dispatched(call, given)
            case _ if call.hook == COMBINE:
                return self._exchanges[call.role].combined(call, given)
        answer = self._recording.value(call.answer)
        return _of_kernel(call, given, answer, ops, layers)


def _of_kernel(call: Call, given: dict[str, Any], answer: Any, ops: Ops, layers: Layers) -> Outcome:
    match call.hook:
        case "paged_mqa_metadata":
            return compared_plan(call, given, answer, layers.plan(call.number), ops)
        case "paged_mqa_logits":
            return compared_scores(call, given, answer, layers.plan(call.uses), ops)
        case "quantized_moe_apply":
            decision = layers.decision(call.layer, given["format"].mode)
            experts = layers.experts(call.uses)
            return compared_experts(call, given, answer, decision.format, experts, ops)
        case "quantized_linear":
            return compared_linear(call, given, answer, layers.linear(call.uses), ops)
        case "qkv_split":
            return compared_parts(call, given, answer, ops)
        case _:
            raise RecordingError(
                f"call {call.number} is of a hook that is not known: {call.hook!r}",
                expected="a hook of this version of Mortise",
                remedy="record again",
            )


def _opaque(call: Call) -> Outcome:
    return Outcome(call=call, verdict=Verdict.NOT_COMPARED)


def _raised(call: Call, kind: str, text: str) -> Outcome:
    return Outcome(call=call, verdict=Verdict.DIVERGENT, note=f"it raised {kind}: {text}")
