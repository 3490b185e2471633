"""The hooks: everything a chip does differently, on one page, in the order they run.

Each hook is described by a :class:`HookSpec` (version, phase) and by the signature and docstring
of the function of the same name below, which are the contract. Symbols: T tokens, H hidden,
I expert intermediate, E experts, E_l local experts, K chosen per token, R received rows,
P pages, D indexer head dimension, N indexer heads; of a projection, N rows and K columns.

A hook answers. ``None`` is an error. ``NOT_SUPPORTED`` is legal from ``create_token_dispatcher``
alone; every other inability is said in ``Backend.supports`` or ``Backend.supports_linear`` before a
layer is built.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, Literal

import pluggy

from mortise.spec.roles import ForwardMode, Phase

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

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
    from mortise.spec.weights import LinearWeight

PROJECT: Final = "mortise"
hookspec: Final = pluggy.HookspecMarker(PROJECT)


class NotSupported(Enum):
    """The type of ``NOT_SUPPORTED``, the one way for a hook to decline."""

    NOT_SUPPORTED = "not_supported"
    """There is none; the core does it in its own way."""


NOT_SUPPORTED: Final = NotSupported.NOT_SUPPORTED


@hookspec(firstresult=True)
def resolve_dispatch_dtype(request: DispatchRequest) -> DispatchDecision:
    """Decide in which format one layer's tokens travel to its experts, and why.

    Runs once per MoE layer and dispatch mode, after the layer's weights were loaded.
    Authority: the user's override; the expert method; the kernel runner when it quantises by
    itself; the device's default. A value that ``request.accepted`` lacks is an error.

    Args:
        request: who asks, the user's override, the schemes of the weights, and the formats that the
            layer's experts can consume.

    Returns:
        A :class:`DispatchDecision`: printable, depends on nothing but ``request``.
    """
    raise AssertionError("a specification is not called")


@hookspec(firstresult=True)
def prepare_expert_weights(experts: ExpertWeights, decision: DispatchDecision) -> ExpertWeights:
    """Lay one layer's expert weights out for the kernel, once after loading and after each reload.

    Idempotent: preparing prepared weights gives the same. The stored tensors may be consumed
    (their memory reused) only if ``prepared`` holds everything ``quantized_moe_apply`` needs.

    Args:
        experts: ``w13`` ``[E_l, 2I, H]``, gate over up, and ``w2`` ``[E_l, H, I]``, each stored by
            a scheme of its own.
        decision: what ``resolve_dispatch_dtype`` answered for this layer and mode.

    Returns:
        ``experts`` with its ``prepared`` slot filled, or unchanged where nothing is to be done.
    """
    raise AssertionError("a specification is not called")


@hookspec(firstresult=True)
def prepare_linear_weight(linear: LinearWeight) -> LinearWeight:
    """Lay one quantised projection out for the kernel, once after loading and after each reload.

    Projections outside the experts: attention, shared experts, dense blocks. Idempotent: preparing
    a prepared weight gives the same. The stored tensors may be consumed (their memory reused) only
    if ``prepared`` holds everything ``quantized_linear`` needs.

    Args:
        linear: a weight ``[N, K]`` of a quantised scheme, its bias ``[N]`` or None.

    Returns:
        ``linear`` with its ``prepared`` slot filled, or unchanged where nothing is to be done.
    """
    raise AssertionError("a specification is not called")


@hookspec(firstresult=True)
def create_token_dispatcher(
    request: TokenDispatcherRequest,
) -> TokenDispatcher | Literal[NotSupported.NOT_SUPPORTED]:
    """Make the device's own expert-parallel exchange, where it has one.

    Args:
        request: experts, sizes, ranks, mode, and the format that was decided for this layer and
            mode.

    Returns:
        A :class:`TokenDispatcher`, or ``NOT_SUPPORTED``: then the core's portable one is used.
    """
    raise AssertionError("a specification is not called")


@hookspec(firstresult=True)
def paged_mqa_metadata(
    context_lens: torch.Tensor, block_size: int, num_workers: int, mode: ForwardMode
) -> PagedMQAMetadata:
    """Plan one forward pass of the indexer over paged keys.

    Args:
        context_lens: int32 ``[rows, next_n]``, contiguous, never negative: how many keys each
            query row sees, itself included. ``next_n`` is 1 unless the backend's
            ``max_native_next_n`` allows more.
        block_size: tokens per page.
        num_workers: workers to share the work among (``Capabilities.num_workers``).
        mode: the kind of forward pass.

    Returns:
        A record that owns the lengths and the schedule made from them. Work is split in units of
        256 tokens as evenly as possible, the remainder to the last workers, each (row, split)
        exactly once. A zero length is planned as one and masked by the true length afterwards.
    """
    raise AssertionError("a specification is not called")


@hookspec(firstresult=True)
def paged_mqa_logits(
    query: torch.Tensor,
    key_pages: IndexKeyPages,
    weights: torch.Tensor,
    page_table: torch.Tensor,
    metadata: PagedMQAMetadata,
) -> torch.Tensor:
    """Score cached keys for the indexer: ``sum_h w[i, h] * relu(q[i, h] . k[j])`` by key scale.

    Args:
        query: ``[rows, next_n, N, D]``, compute dtype, rotary embedding applied.
        key_pages: cached keys ``[P, block_size, D]`` with scales where they are quantised.
        weights: float32 ``[rows * next_n, N]``, both softmax scales folded in.
        page_table: int32 ``[rows, pages]``: page of each block of the row's request.
        metadata: the plan of this forward pass; it holds the context lengths.

    Returns:
        float32 ``[rows * next_n, columns]``, ``columns >= metadata.max_context_len``; column j is
        the key at position j. Columns at or past a row's length are undefined: the caller masks.
    """
    raise AssertionError("a specification is not called")


@hookspec(firstresult=True)
def quantized_moe_apply(
    tokens: DispatchedTokens, experts: ExpertWeights, out_dtype: torch.dtype
) -> torch.Tensor:
    """Gate and up projection, SwiGLU (gate first), down projection on dispatched rows.

    Results are multiplied by routing weights only where ``tokens.routing_weight_side`` says that
    the experts do it. Rows past the last group are undefined and are not read; a group may be
    empty, one expert may hold all rows, R may be 0.

    Args:
        tokens: rows ``[R, H]`` (grouped) or ``[E_l, capacity, H]`` (masked), their scales, and a
            group list.
        experts: this layer's weights, prepared.
        out_dtype: dtype of the result.

    Returns:
        Rows in the layout of ``tokens.rows``, dtype ``out_dtype``; may not alias the input.
    """
    raise AssertionError("a specification is not called")


@hookspec(firstresult=True)
def quantized_linear(
    rows: torch.Tensor, linear: LinearWeight, out_dtype: torch.dtype
) -> torch.Tensor:
    """Multiply rows by one quantised projection outside the experts, and add its bias.

    Args:
        rows: ``[T, K]`` in the compute dtype, unquantised, contiguous or not; the scheme of the
            weight says whether and how they are quantised first. T may be 0.
        linear: the projection ``[N, K]``, prepared.
        out_dtype: dtype of the result.

    Returns:
        ``[T, N]`` of dtype ``out_dtype``; may not alias the input.
    """
    raise AssertionError("a specification is not called")


@hookspec(firstresult=True)
def qkv_split(
    projected_qkvz: torch.Tensor, projected_ba: torch.Tensor, shape: QKVShape
) -> QKVParts:
    """Split the fused projections of gated delta net attention.

    Args:
        projected_qkvz: ``[T, 2*nk*hk + 2*nv*hv]``.
        projected_ba: ``[T, 2*nv]``.
        shape: heads, head sizes and the stored layout.

    Returns:
        :class:`QKVParts`, every tensor contiguous, also for one head, one token and no token.
        Any number of tokens works: a kernel with limits loops, or hands over to the reference.
    """
    raise AssertionError("a specification is not called")


@dataclass(frozen=True, slots=True, kw_only=True)
class HookSpec:
    """One hook of the table.

    Args:
        name: of the function that specifies it.
        version: raised by every change that is not an addition with a default.
        phase: when it runs.
    """

    name: str
    version: int
    phase: Phase


HOOKS: Final[Mapping[str, HookSpec]] = MappingProxyType(
    {
        name: HookSpec(name=name, version=1, phase=phase)
        for name, phase in (
            ("resolve_dispatch_dtype", Phase.POLICY),
            ("prepare_expert_weights", Phase.LAYOUT),
            ("prepare_linear_weight", Phase.LAYOUT),
            ("create_token_dispatcher", Phase.LAYOUT),
            ("paged_mqa_metadata", Phase.STEP),
            ("paged_mqa_logits", Phase.KERNEL),
            ("quantized_moe_apply", Phase.KERNEL),
            ("quantized_linear", Phase.KERNEL),
            ("qkv_split", Phase.KERNEL),
        )
    }
)
"""Every hook by name, in the order in which they run."""

PAIRED_HOOKS: Final = (
    frozenset({"prepare_expert_weights", "quantized_moe_apply"}),
    frozenset({"prepare_linear_weight", "quantized_linear"}),
    frozenset({"paged_mqa_metadata", "paged_mqa_logits"}),
)
"""Hooks that share a record only their author can read: one backend answers all of a set."""
