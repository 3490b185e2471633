"""What a loaded model will launch, launched once for every size that is compiled for itself."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import torch

from mortise.plugin import (
    NOT_SUPPORTED,
    DispatchMode,
    ForwardMode,
    IndexKeyDtype,
    IndexKeyPages,
    Routing,
    TokenDispatcherRequest,
    WarmupJob,
)
from mortise.reference.dispatch import create_token_dispatcher

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mortise.plugin import (
        Backend,
        DispatchDecision,
        DispatchedTokens,
        ExpertWeights,
        LinearWeight,
        QKVShape,
        StoredWeight,
        WarmupRequest,
    )

PAGE_SIZE: Final = 64

TILE: Final = 64
"""Rows of DeepGEMM's smallest tile."""


def sizes(most: int, *, ahead: bool = False) -> tuple[int, ...]:
    """Powers of two below ``most``, and ``most``: between two of them Triton compiles the same.

    Args:
        most: the largest.
        ahead: also every 64th, since DeepGEMM chooses its tiles by the number of rows.
    """
    powers = (1 << power for power in range(most.bit_length()))
    between = range(TILE, most, TILE) if ahead else ()
    return tuple(sorted({most, *powers, *between} - {0}))


def launches(backend: Backend, device: torch.device, request: WarmupRequest) -> list[WarmupJob]:
    """One job for every hook, shape and size, each of which calls the hook with zeros.

    A program is compiled for the dtypes and constants of its launch, and so is a kernel of
    DeepGEMM; the numbers do not matter.

    Args:
        backend: whose hooks are called.
        device: where tensors live.
        request: what the model will ask.
    """
    found = _Launches(backend, device, request)
    jobs = (*found.experts(), *found.linears(), *found.indexer(), *found.splits())
    return [replace(job, run=_on(device, job.run)) for job in jobs]


def _on(device: torch.device, run: Callable[[], None]) -> Callable[[], None]:
    """The same on one device: a job has a thread of its own, and each thread its own device."""

    def there() -> None:
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            run()

    return there


def _layout(stored: StoredWeight) -> tuple[object, ...]:
    """What programs are compiled with besides scheme and shape."""
    scales = None if stored.scale is None else tuple(stored.scale.shape)
    return (stored.num_parts, stored.scale_format, scales)


@dataclass(frozen=True, slots=True)
class _Launches:
    backend: Backend
    device: torch.device
    request: WarmupRequest

    def experts(self) -> Iterator[WarmupJob]:
        for experts in self.request.experts:
            for decision in self.request.dispatch.get(experts.layer, ()):
                for tokens in self._sizes_of(decision):
                    yield self._of_experts(experts, decision, tokens)

    def _sizes_of(self, decision: DispatchDecision) -> tuple[int, ...]:
        """Rows of an exchange of fixed size are as many for one token as for all."""
        most, limit = self.request.max_tokens, self._limit(decision)
        return tuple(sorted({1, min(most, limit)})) if limit else self._sizes()

    def _limit(self, decision: DispatchDecision) -> int:
        is_fixed = decision.format.mode is DispatchMode.LOW_LATENCY
        return self.request.max_tokens_per_rank if is_fixed else 0

    def _of_experts(
        self, experts: ExpertWeights, decision: DispatchDecision, tokens: int
    ) -> WarmupJob:
        shape = (experts.num_local_experts, experts.hidden_size, experts.intermediate_size)
        schemes = (experts.w13.scheme, experts.w2.scheme)
        mode = decision.format.mode
        name = " ".join(
            [
                f"experts {shape[0]} x {shape[1]} x {shape[2]},",
                f"{schemes[0].value}, {decision.format.dtype.value} rows, {mode.value}:",
                f"{tokens} tokens",
            ]
        )

        def run() -> None:
            arrived = self._arrived(experts, decision, tokens)
            self._hook("quantized_moe_apply")(arrived, experts, self.request.compute_dtype)

        layouts = (_layout(experts.w13), _layout(experts.w2))
        return WarmupJob(
            name=name, key=("experts", shape, schemes, layouts, decision.format, tokens), run=run
        )

    def _arrived(
        self, experts: ExpertWeights, decision: DispatchDecision, tokens: int
    ) -> DispatchedTokens:
        """Zeros as they would arrive, each token at the first experts; from this process alone."""
        chosen = min(self.request.num_experts_per_tok, experts.num_local_experts)
        places = self.request.world_size * self._limit(decision)
        ask = TokenDispatcherRequest(
            role=self.request.role,
            layer=experts.layer,
            num_experts=experts.num_local_experts,
            num_experts_per_tok=chosen,
            hidden_size=experts.hidden_size,
            mode=decision.format.mode,
            max_tokens_per_rank=places or tokens,
            format=decision.format,
        )
        dispatcher: Any = self._hook("create_token_dispatcher")(ask)
        if dispatcher is NOT_SUPPORTED:
            dispatcher = create_token_dispatcher(ask)
        ids = torch.arange(chosen, device=self.device).expand(tokens, -1).contiguous()
        routing = Routing(topk_ids=ids, topk_weights=torch.ones(ids.shape, device=self.device))
        arrived: DispatchedTokens
        arrived, handle = dispatcher.dispatch(
            self._zeros(tokens, experts.hidden_size), routing, decision.format
        )
        if arrived.receive is not None:
            arrived.receive()
        rows = torch.zeros(
            *arrived.rows.shape[:-1],
            experts.hidden_size,
            dtype=self.request.compute_dtype,
            device=self.device,
        )
        dispatcher.combine(rows, handle)
        return arrived

    def linears(self) -> Iterator[WarmupJob]:
        for linear in self.request.linears:
            for tokens in self._sizes():
                yield self._of_linear(linear, tokens)

    def _of_linear(self, linear: LinearWeight, tokens: int) -> WarmupJob:
        scheme, shape = linear.stored.scheme, (linear.out_features, linear.in_features)
        layout = (linear.bias is not None, *_layout(linear.stored))

        def run() -> None:
            rows = self._zeros(tokens, linear.in_features)
            self._hook("quantized_linear")(rows, linear, self.request.compute_dtype)

        return WarmupJob(
            name=f"projection {shape[0]} x {shape[1]}, {scheme.value}: {tokens} tokens",
            key=("linear", shape, scheme, layout, tokens),
            run=run,
        )

    def indexer(self) -> Iterator[WarmupJob]:
        heads, dim = self.request.index_heads, self.request.index_head_dim
        for rows in self._sizes() if heads else ():
            yield WarmupJob(
                name=f"index scores, {heads} heads of {dim}: {rows} rows",
                key=("indexer", heads, dim, self.request.index_key_dtype, rows),
                run=self._scoring(rows),
            )

    def _scoring(self, rows: int) -> Callable[[], None]:
        heads, dim = self.request.index_heads, self.request.index_head_dim

        def run() -> None:
            lens = torch.ones(rows, 1, dtype=torch.int32, device=self.device)
            workers = self.backend.capabilities().num_workers
            metadata = self._hook("paged_mqa_metadata")(
                lens, PAGE_SIZE, workers, ForwardMode.DECODE
            )
            self._hook("paged_mqa_logits")(
                self._zeros(rows, 1, heads, dim),
                self._keys(dim),
                torch.zeros(rows, heads, device=self.device),
                torch.zeros(rows, 1, dtype=torch.int32, device=self.device),
                metadata,
            )

        return run

    def _keys(self, dim: int) -> IndexKeyPages:
        """Pages of keys, laid out as the cache lays them out; two, since one has no stride."""
        if self.request.index_key_dtype is IndexKeyDtype.COMPUTE:
            return IndexKeyPages(keys=self._zeros(2, PAGE_SIZE, dim))
        block = torch.zeros(2, PAGE_SIZE * (dim + 4), dtype=torch.uint8, device=self.device)
        keys = block[:, : PAGE_SIZE * dim].view(torch.float8_e4m3fn)
        return IndexKeyPages(
            keys=keys.unflatten(1, (PAGE_SIZE, dim)),
            scales=block[:, PAGE_SIZE * dim :].view(torch.float32),
        )

    def splits(self) -> Iterator[WarmupJob]:
        for shape in self.request.qkv_shapes:
            for tokens in self._sizes():
                yield self._of_split(shape, tokens)

    def _of_split(self, shape: QKVShape, tokens: int) -> WarmupJob:
        keys = shape.num_key_heads * shape.key_head_dim
        values = shape.num_value_heads * shape.value_head_dim

        def run() -> None:
            qkvz = self._zeros(tokens, 2 * keys + 2 * values)
            ba = self._zeros(tokens, 2 * shape.num_value_heads)
            self._hook("qkv_split")(qkvz, ba, shape)

        return WarmupJob(
            name=f"split of {shape.num_key_heads}/{shape.num_value_heads} heads: {tokens} tokens",
            key=("qkv", shape, tokens),
            run=run,
        )

    def _sizes(self) -> tuple[int, ...]:
        return sizes(self.request.max_tokens, ahead=self.request.ahead)

    def _hook(self, name: str) -> Callable[..., Any]:
        hook: Callable[..., Any] = getattr(self.backend, name)
        return hook

    def _zeros(self, *size: int) -> torch.Tensor:
        return torch.zeros(size, dtype=self.request.compute_dtype, device=self.device)
