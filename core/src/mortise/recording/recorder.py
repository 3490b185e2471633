"""Keeps what hooks are asked and what they answer, as far as there is room for it."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import torch

from mortise.recording.codec import encode
from mortise.recording.documents import FORMAT, SCHEMA, Call, Header, LeftOut, WhoAnswered
from mortise.recording.passes import RunningModules
from mortise.recording.recorded_ops import RecordedOps

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from mortise.backends import Ops
    from mortise.recording.sampling import Sampling
    from mortise.recording.writer import RecordingWriter
    from mortise.spec.paged_mqa import PagedMQAMetadata
    from mortise.spec.roles import ForwardMode, ModelRole

SAMPLE, SIZE = "sample", "max_bytes"
"""Why a call is not kept."""


class Recorder:
    """Records the hooks of every role of one run, made with ``LLM(..., wrap_ops=recorder.wrap)``.

    Inputs are copied before a hook is called, since it may use their memory. What recording costs
    is time and the writer's disk; what a model computes it does not change.

    Args:
        writer: where to.
        sampling: what to keep.
    """

    def __init__(self, writer: RecordingWriter, sampling: Sampling) -> None:
        self._writer = writer
        self._sampling = sampling
        self.running = RunningModules()
        self._number = 0
        self._left_out: Counter[tuple[str, str, str, str]] = Counter()
        self._backends: dict[str, WhoAnswered] = {}
        # Number of the call that prepared the weights of a role's layer, or that left them out.
        self._prepared: dict[tuple[ModelRole, str], int | None] = {}
        self._planned: dict[int, tuple[PagedMQAMetadata, int]] = {}

    def wrap(self, ops: Ops) -> Ops:
        """The same hooks, which tell the recorder what they are asked and what they answer."""
        identity = ops.backend
        self._backends[ops.role.value] = WhoAnswered(
            name=identity.name,
            distribution=identity.distribution,
            version=identity.version,
            emulated=identity.emulated,
            device=str(ops.capabilities.device),
        )
        return RecordedOps(self, ops).table()

    def watch(self, model: nn.Module) -> None:
        """Follow a loaded model, to say of each call which module made it in which pass."""
        self.running.watch(model)

    def finish(self, *, model: str, dtype: torch.dtype, threads: int, version: str) -> Header:
        """Write the index.

        Args:
            model: directory of the model.
            dtype: of the hidden state.
            threads: of one operation on the processor.
            version: of the core.

        Raises:
            RecordingError: it cannot be written.
        """
        header = Header(
            format=FORMAT,
            schema=SCHEMA,
            mortise=version,
            model=model,
            dtype=str(dtype).removeprefix("torch."),
            threads=threads,
            backends=self._backends,
            sample=str(self._sampling),
            max_bytes=self._writer.max_bytes,
            tensor_bytes=self._writer.tensor_bytes,
            num_calls=self._number,
            left_out=[
                LeftOut(hook=hook, layer=layer, role=role, reason=reason, calls=calls)
                for (hook, layer, role, reason), calls in sorted(self._left_out.items())
            ],
            files={},
        )
        self._writer.finish(header)
        return header

    def begin(self) -> int:
        """Count a call."""
        self._number += 1
        return self._number

    def keeps(
        self,
        hook: str,
        layer: str,
        role: ModelRole,
        tensors: tuple[torch.Tensor | None, ...],
        uses: int | None = 0,
    ) -> bool:
        """Whether a call is kept; if not, it is noted why.

        Args:
            hook: that is called.
            layer: that calls it.
            role: of the model.
            tensors: that it is asked with.
            uses: the earlier call that it builds on; None is one that was not kept, 0 none.
        """
        reason = None
        if not (self._sampling.has_pass(self.running.number) and self._sampling.has_layer(layer)):
            reason = SAMPLE
        elif uses is None or not self._writer.room_for(one for one in tensors if one is not None):
            reason = SIZE
        if reason is not None:
            self.leave_out(hook, layer, role, reason)
        return reason is None

    def leave_out(self, hook: str, layer: str, role: ModelRole, reason: str) -> None:
        """Note a call that is not kept."""
        self._left_out[hook, layer, role.value, reason] += 1

    def add(
        self,
        number: int,
        hook: str,
        layer: str,
        role: ModelRole,
        arguments: Mapping[str, Any],
        answer: Any = None,
        *,
        mode: ForwardMode | None = None,
        uses: int = 0,
    ) -> bool:
        """Keep a call, unless there is no room for its answer; then it is noted.

        ``arguments`` are encoded already, since the hook may have changed them.
        """
        mode = mode or self.running.mode
        answers = answer.values() if isinstance(answer, dict) else (answer,)
        if not self._writer.room_for(one for one in answers if isinstance(one, torch.Tensor)):
            self.leave_out(hook, layer, role, SIZE)
            return False
        self._writer.add(
            Call.model_validate(
                {
                    "number": number,
                    "hook": hook,
                    "role": role.value,
                    "layer": layer,
                    "pass": self.running.number,
                    "mode": None if mode is None else mode.value,
                    "arguments": dict(arguments),
                    "answer": self.encoded(answer),
                    "uses": uses,
                }
            )
        )
        return True

    def encoded(self, value: Any) -> Any:
        """A value as the index holds it, its tensors kept."""
        return encode(value, self._writer.keep)

    def remember_weights(self, role: ModelRole, layer: str, number: int | None) -> None:
        """Note which call holds the weights of a layer; None if none does."""
        self._prepared[role, layer] = number

    def weights_of(self, role: ModelRole, layer: str) -> int | None:
        """Number of the call that holds the weights of a layer."""
        return self._prepared.get((role, layer))

    def remember_plan(self, metadata: PagedMQAMetadata, number: int) -> None:
        """Note which call made a schedule; the record is held, so that its identity is its own."""
        self._planned = {id(metadata): (metadata, number)} | dict(list(self._planned.items())[:8])

    def plan_of(self, metadata: PagedMQAMetadata) -> int | None:
        """Number of the call that made a schedule; None if it was not kept."""
        found = self._planned.get(id(metadata))
        return None if found is None else found[1]
