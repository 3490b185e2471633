"""The hooks of one model role with a recorder around each of them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from mortise.recording.dispatchers import RecordedDispatcher
from mortise.recording.rows import PlainRows, counts_of, packed, row_places
from mortise.spec.hooks import NotSupported

if TYPE_CHECKING:
    from collections.abc import Callable

    from mortise.backends import Ops
    from mortise.recording.recorder import Recorder
    from mortise.spec.capabilities import (
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
    from mortise.spec.paged_mqa import IndexKeyPages, PagedMQAMetadata
    from mortise.spec.qkv import QKVParts, QKVShape
    from mortise.spec.roles import ForwardMode
    from mortise.spec.weights import LinearWeight

    Answer = TypeVar("Answer")


class RecordedOps:
    """The hooks of one role, each with the recorder around it.

    Args:
        recorder: is told.
        ops: the hooks themselves.
    """

    def __init__(self, recorder: Recorder, ops: Ops) -> None:
        self._recorder = recorder
        self._ops = ops
        self._role = ops.role

    def table(self) -> Ops:
        """What a model is given."""
        return replace(
            self._ops,
            resolve_dispatch_dtype=self.resolve_dispatch_dtype,
            prepare_expert_weights=self.prepare_expert_weights,
            prepare_linear_weight=self.prepare_linear_weight,
            create_token_dispatcher=self.create_token_dispatcher,
            paged_mqa_metadata=self.paged_mqa_metadata,
            paged_mqa_logits=self.paged_mqa_logits,
            quantized_moe_apply=self.quantized_moe_apply,
            quantized_linear=self.quantized_linear,
            qkv_split=self.qkv_split,
            supports=self.supports,
            supports_linear=self.supports_linear,
        )

    def supports(self, request: ExpertLayerRequest, /) -> Support:
        """Recorded, since an expert method decides about formats too."""
        return self._data("supports", self._ops.supports, request)

    def supports_linear(self, request: LinearLayerRequest, /) -> Support:
        """Recorded beside :meth:`supports`."""
        return self._data("supports_linear", self._ops.supports_linear, request)

    def resolve_dispatch_dtype(self, request: DispatchRequest, /) -> DispatchDecision:
        """Request and decision are data."""
        return self._data("resolve_dispatch_dtype", self._ops.resolve_dispatch_dtype, request)

    def _data(self, hook: str, function: Callable[[Any], Answer], request: Any) -> Answer:
        recorder, number = self._recorder, self._recorder.begin()
        answer = function(request)
        if recorder.keeps(hook, request.layer, self._role, ()):
            arguments = {"request": recorder.encoded(request)}
            recorder.add(number, hook, request.layer, self._role, arguments, answer)
        return answer

    def prepare_expert_weights(
        self, experts: ExpertWeights, decision: DispatchDecision, /
    ) -> ExpertWeights:
        """Stored tensors are kept once a layer: prepared ones may have lost them."""
        recorder, hook, number = self._recorder, "prepare_expert_weights", self._recorder.begin()
        stored = experts.prepared is None
        tensors = (*_tensors(experts.w13), *_tensors(experts.w2)) if stored else ()
        uses = 0 if stored else recorder.weights_of(self._role, experts.layer)
        arguments: dict[str, Any] | None = None
        if recorder.keeps(hook, experts.layer, self._role, tensors, uses):
            arguments = {"decision": recorder.encoded(decision)}
            if stored:
                arguments |= {
                    "w13": recorder.encoded(experts.w13),
                    "w2": recorder.encoded(experts.w2),
                    "num_local_experts": experts.num_local_experts,
                    "hidden_size": experts.hidden_size,
                    "intermediate_size": experts.intermediate_size,
                }
        if stored:
            kept = number if arguments is not None else None
            recorder.remember_weights(self._role, experts.layer, kept)
        answer = self._ops.prepare_expert_weights(experts, decision)
        if arguments is not None:
            recorder.add(number, hook, experts.layer, self._role, arguments, uses=uses or 0)
        return answer

    def prepare_linear_weight(self, linear: LinearWeight, /) -> LinearWeight:
        """As :meth:`prepare_expert_weights`."""
        recorder, hook, number = self._recorder, "prepare_linear_weight", self._recorder.begin()
        tensors = (*_tensors(linear.stored), linear.bias)
        arguments = None
        if recorder.keeps(hook, linear.layer, self._role, tensors):
            arguments = {"linear": recorder.encoded(replace(linear, prepared=None))}
        kept = number if arguments is not None else None
        recorder.remember_weights(self._role, linear.layer, kept)
        answer = self._ops.prepare_linear_weight(linear)
        if arguments is not None:
            recorder.add(number, hook, linear.layer, self._role, arguments)
        return answer

    def create_token_dispatcher(
        self, request: TokenDispatcherRequest, /
    ) -> TokenDispatcher | NotSupported:
        """Whether there is one; the backend's own is recorded call by call."""
        recorder, hook, number = self._recorder, "create_token_dispatcher", self._recorder.begin()
        answer = self._ops.create_token_dispatcher(request)
        is_own, is_kept = not isinstance(answer, NotSupported), False
        if recorder.keeps(hook, request.layer, self._role, ()):
            arguments = {"request": recorder.encoded(request)}
            is_kept = recorder.add(number, hook, request.layer, self._role, arguments, is_own)
        if isinstance(answer, NotSupported):
            return answer
        return RecordedDispatcher(recorder, answer, request, number if is_kept else None)

    def paged_mqa_metadata(
        self, context_lens: torch.Tensor, block_size: int, num_workers: int, mode: ForwardMode, /
    ) -> PagedMQAMetadata:
        """The lengths, and what the backend made of them as far as others can read it."""
        recorder, hook, number = self._recorder, "paged_mqa_metadata", self._recorder.begin()
        arguments = None
        if recorder.keeps(hook, "", self._role, (context_lens,)):
            arguments = {
                "context_lens": recorder.encoded(context_lens),
                "block_size": block_size,
                "num_workers": num_workers,
                "mode": recorder.encoded(mode),
            }
        answer = self._ops.paged_mqa_metadata(context_lens, block_size, num_workers, mode)
        if arguments is not None:
            described = {
                "max_context_len": answer.max_context_len,
                "context_lens": answer.context_lens,
                "schedule": answer.schedule,
                "planned_lens": answer.planned_lens,
            }
            if recorder.add(number, hook, "", self._role, arguments, described, mode=mode):
                recorder.remember_plan(answer, number)
        return answer

    def paged_mqa_logits(
        self,
        query: torch.Tensor,
        key_pages: IndexKeyPages,
        weights: torch.Tensor,
        page_table: torch.Tensor,
        metadata: PagedMQAMetadata,
        /,
    ) -> torch.Tensor:
        """Of the cache, the pages that the page table names; of the answer, visible columns."""
        recorder, hook, number = self._recorder, "paged_mqa_logits", self._recorder.begin()
        layer, planned_by = recorder.running.layer, recorder.plan_of(metadata)
        # One length a row here, whatever next_n is: columns past the longest are nobody's.
        num_pages = -(-metadata.max_context_len // metadata.block_size)
        used, places = page_table[:, :num_pages].unique(return_inverse=True)
        keys = _selected(key_pages.keys, used)
        scales = None if key_pages.scales is None else key_pages.scales[used]
        arguments, tensors = None, (query, keys, scales, weights, places)
        if recorder.keeps(hook, layer, self._role, tensors, planned_by):
            given = {
                "query": query,
                "keys": keys,
                "scales": scales,
                "weights": weights,
                "page_table": places.to(torch.int32),
            }
            arguments = {name: recorder.encoded(one) for name, one in given.items()}
        answer = self._ops.paged_mqa_logits(query, key_pages, weights, page_table, metadata)
        if arguments is not None:
            visible = answer[:, : metadata.max_context_len]
            recorder.add(number, hook, layer, self._role, arguments, visible, uses=planned_by or 0)
        return answer

    def quantized_moe_apply(
        self, tokens: DispatchedTokens, experts: ExpertWeights, out_dtype: torch.dtype, /
    ) -> torch.Tensor:
        """Rows and results are kept packed, without what their layout puts around them."""
        recorder, hook, number = self._recorder, "quantized_moe_apply", self._recorder.begin()
        layer = experts.layer
        weights = recorder.weights_of(self._role, layer)
        tensors = (tokens.rows, tokens.scales, tokens.row_weights)
        arguments: dict[str, Any] | None = None
        if recorder.keeps(hook, layer, self._role, tensors, weights):
            plain = PlainRows.of(tokens)
            arguments = {
                "format": recorder.encoded(tokens.format),
                "rows": recorder.encoded(plain.rows),
                "scales": recorder.encoded(plain.scales),
                "row_weights": recorder.encoded(plain.row_weights),
                "counts": list(plain.counts),
                "capacity": plain.capacity,
                "counts_on_host": plain.counts_on_host,
                "kind": recorder.encoded(plain.kind),
                "out_dtype": recorder.encoded(out_dtype),
            }
        answer = self._ops.quantized_moe_apply(tokens, experts, out_dtype)
        if arguments is not None:
            places = row_places(counts_of(tokens), tokens.format, tokens.rows.shape)
            results = packed(answer, places, tokens.format)
            recorder.add(number, hook, layer, self._role, arguments, results, uses=weights or 0)
        return answer

    def quantized_linear(
        self, rows: torch.Tensor, linear: LinearWeight, out_dtype: torch.dtype, /
    ) -> torch.Tensor:
        """Rows and results."""
        recorder, hook, number = self._recorder, "quantized_linear", self._recorder.begin()
        layer = linear.layer
        weights = recorder.weights_of(self._role, layer)
        arguments = None
        if recorder.keeps(hook, layer, self._role, (rows,), weights):
            arguments = {"rows": recorder.encoded(rows), "out_dtype": recorder.encoded(out_dtype)}
        answer = self._ops.quantized_linear(rows, linear, out_dtype)
        if arguments is not None:
            recorder.add(number, hook, layer, self._role, arguments, answer, uses=weights or 0)
        return answer

    def qkv_split(
        self, projected_qkvz: torch.Tensor, projected_ba: torch.Tensor, shape: QKVShape, /
    ) -> QKVParts:
        """Both projections and the four parts."""
        recorder, hook, number = self._recorder, "qkv_split", self._recorder.begin()
        layer, arguments = recorder.running.layer, None
        if recorder.keeps(hook, layer, self._role, (projected_qkvz, projected_ba)):
            arguments = {
                "projected_qkvz": recorder.encoded(projected_qkvz),
                "projected_ba": recorder.encoded(projected_ba),
                "shape": recorder.encoded(shape),
            }
        answer = self._ops.qkv_split(projected_qkvz, projected_ba, shape)
        if arguments is not None:
            parts = {"mixed_qkv": answer.mixed_qkv, "z": answer.z, "b": answer.b, "a": answer.a}
            recorder.add(number, hook, layer, self._role, arguments, parts)
        return answer


def _tensors(stored: Any) -> tuple[torch.Tensor | None, ...]:
    return (
        stored.weight,
        stored.scale,
        stored.global_scale,
        stored.input_scale,
        stored.input_offset,
    )


def _selected(pages: torch.Tensor, used: torch.Tensor) -> torch.Tensor:
    """Some pages; as bytes where torch cannot index the dtype."""
    if pages.dtype is not torch.float8_e4m3fn:
        return pages.index_select(0, used)
    return pages.view(torch.uint8).index_select(0, used).view(torch.float8_e4m3fn)
