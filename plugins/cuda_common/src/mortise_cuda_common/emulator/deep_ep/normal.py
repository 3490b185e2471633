"""The exchange of variable size: a row for each token and rank, in the order of the sources."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from mortise_cuda_common.emulator.deep_ep.packets import exchange, gather, unwritten
from mortise_cuda_common.emulator.deep_ep.refusal import device_needs, need

if TYPE_CHECKING:
    import torch.distributed as dist

    from mortise_cuda_common.emulator.deep_ep.config import Config

MOST_LOCAL_EXPERTS = 1024
LAUNCHED_RANKS = (2, 4, 8)

# The prefixes of channels mean nothing where there are none; the ranks' are what a combine reads.
Handle = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Layout:
    """How many rows go where.

    Attributes:
        per_rank: int32 ``[G]``, tokens to each rank.
        per_expert: int32 ``[E]``, choices of each expert.
        is_in_rank: bool ``[T, G]``, whether a token goes to a rank.
    """

    per_rank: torch.Tensor
    per_expert: torch.Tensor
    is_in_rank: torch.Tensor


@dataclass(frozen=True, slots=True)
class Sent:
    """What one rank sends.

    Attributes:
        rows: ``[T, H]``.
        scales: ``[T, S]`` of float32 or int32, or None.
        ids: int64 ``[T, K]``, or None.
        weights: float32 ``[T, K]``, or None.
        layout: where to.
    """

    rows: torch.Tensor
    scales: torch.Tensor | None
    ids: torch.Tensor | None
    weights: torch.Tensor | None
    layout: Layout


@dataclass(frozen=True, slots=True)
class Received:
    """What came.

    Attributes:
        rows: ``[N, H]``, by source rank and token.
        scales: ``[N, S]``, or None.
        ids: int64 ``[N, K]``, local experts, -1 for those of others; or None.
        weights: float32 ``[N, K]``, 0 for experts of others; or None.
        counts: rows of each local expert, rounded up to the alignment.
        handle: what a combine needs.
    """

    rows: torch.Tensor
    scales: torch.Tensor | None
    ids: torch.Tensor | None
    weights: torch.Tensor | None
    counts: list[int]
    handle: Handle


def layout_of(ids_TK: torch.Tensor, num_experts: int, num_ranks: int) -> Layout:
    """Count tokens per rank, each once, and choices per expert; -1 is no choice."""
    each = num_experts // num_ranks
    rank_of_choice = torch.where(ids_TK < 0, -1, ids_TK // each)
    is_in_rank = (rank_of_choice.unsqueeze(2) == torch.arange(num_ranks)).any(1)
    return Layout(
        per_rank=is_in_rank.sum(0, dtype=torch.int32),
        per_expert=torch.bincount(ids_TK[ids_TK >= 0], minlength=num_experts).to(torch.int32),
        is_in_rank=is_in_rank,
    )


def check_sent(sent: Sent, num_ranks: int, config: Config, num_nvl_bytes: int) -> None:
    """Refuse what ``intranode_dispatch`` refuses.

    Raises:
        RuntimeError: with its condition.
        NotImplementedError: more ranks than one machine has.
    """
    rows, scales, layout = sent.rows, sent.scales, sent.layout
    if num_ranks > max(LAUNCHED_RANKS):
        raise NotImplementedError("the normal exchange between machines is not emulated")
    need(config.num_sms % 2 == 0, "config.num_sms % 2 == 0")
    need(layout.is_in_rank.dtype is torch.bool, "is_token_in_rank.scalar_type() == torch::kBool")
    for name, counts in (
        ("num_tokens_per_expert", layout.per_expert),
        ("num_tokens_per_rank", layout.per_rank),
    ):
        need(counts.dtype is torch.int32, f"{name}->scalar_type() == torch::kInt32")
    need(rows.dim() == 2 and rows.is_contiguous(), "x.dim() == 2 and x.is_contiguous()")
    need(
        rows.shape[1] * rows.element_size() % 16 == 0,
        "(x.size(1) * x.element_size()) % sizeof(int4) == 0",
    )
    need(
        tuple(layout.is_in_rank.shape) == (rows.shape[0], num_ranks),
        "is_token_in_rank.size(0) == x.size(0) and is_token_in_rank.size(1) == num_ranks",
    )
    num_experts = layout.per_expert.shape[0]
    need(num_experts % num_ranks == 0, "num_tokens_per_expert->size(0) % num_ranks == 0")
    need(
        num_experts // num_ranks <= MOST_LOCAL_EXPERTS,
        "num_tokens_per_expert->size(0) / num_ranks <= LEGACY_NUM_MAX_LOCAL_EXPERTS",
    )
    need(num_ranks in LAUNCHED_RANKS, 'false and "Unsupported ranks"')
    _check_choices(sent)
    _check_scales(rows, scales)
    used = config.needed_nvl_bytes(
        num_ranks,
        rows.shape[1] * rows.element_size(),
        0 if sent.ids is None else sent.ids.shape[1],
        0 if scales is None else scales.shape[1],
    )
    need(used <= num_nvl_bytes, f"{used} bytes <= num_nvl_bytes, which is {num_nvl_bytes}")


def _check_choices(sent: Sent) -> None:
    ids, weights = sent.ids, sent.weights
    need((ids is None) is (weights is None), "topk_idx.has_value() == topk_weights.has_value()")
    if ids is None or weights is None:
        return
    need(ids.dtype is torch.int64, "expected scalar type Long")
    for name, one in (("topk_idx", ids), ("topk_weights", weights)):
        need(one.dim() == 2 and one.is_contiguous(), f"{name}->dim() == 2 and contiguous")
        need(one.shape[0] == sent.rows.shape[0], f"num_tokens == {name}->size(0)")
    need(ids.shape == weights.shape, "num_topk == topk_weights->size(1)")
    need(weights.dtype is torch.float32, "topk_weights->scalar_type() == torch::kFloat32")


def _check_scales(rows: torch.Tensor, scales: torch.Tensor | None) -> None:
    if scales is None:
        # The kernel copies any two-byte format; the library promises bfloat16.
        need(rows.dtype is torch.bfloat16, "x.scalar_type() == torch::kBFloat16")
        return
    need(rows.element_size() == 1, "x.element_size() == 1")
    need(
        scales.dtype in (torch.float32, torch.int32),
        "x_scales->scalar_type() == torch::kFloat32 or x_scales->scalar_type() == torch::kInt",
    )
    need(scales.dim() == 2 and scales.shape[0] == rows.shape[0], "x_scales->size(0) == num_tokens")


def dispatch(
    group: dist.ProcessGroup, sent: Sent, alignment: int, num_worst_tokens: int
) -> Received:
    """Send each token once to every rank that holds one of its experts."""
    layout, num_ranks = sent.layout, group.size()
    num_local = layout.per_expert.shape[0] // num_ranks
    to_rank, token = layout.is_in_rank.T.nonzero(as_tuple=True)
    parts = [sent.rows.view(torch.uint8)[token], token.to(torch.int32)]
    if sent.scales is not None:
        parts.append(sent.scales[token])
    if sent.ids is not None and sent.weights is not None:
        parts += _choices_there(sent.ids[token], sent.weights[token], to_rank, num_local)
    arrived, _ = exchange(group, parts, layout.per_rank.tolist())
    every_rank = gather(group, layout.per_rank)
    counts = gather(group, layout.per_expert).sum(0).view(num_ranks, num_local)[group.rank()]
    rows, sources, *rest = arrived
    scales = rest.pop(0) if sent.scales is not None else None
    ids, weights = rest or (None, None)
    handle = _handle(every_rank, sources, layout.is_in_rank)
    received = Received(
        rows.view(sent.rows.dtype),
        scales,
        ids,
        weights,
        [-(-count // alignment) * alignment for count in counts.tolist()],
        handle,
    )
    return _worst(received, num_worst_tokens) if num_worst_tokens else received


def _choices_there(
    ids: torch.Tensor, weights: torch.Tensor, to_rank: torch.Tensor, num_local: int
) -> list[torch.Tensor]:
    """The choices of rows as the rank that they go to sees them."""
    is_there = (ids >= 0) & (ids // num_local == to_rank.unsqueeze(1))
    return [torch.where(is_there, ids % num_local, -1), torch.where(is_there, weights, 0.0)]


def _handle(every_rank: torch.Tensor, sources: torch.Tensor, is_in_rank: torch.Tensor) -> Handle:
    no_channels = torch.zeros(every_rank.shape[0], 0, dtype=torch.int32)
    positions = is_in_rank.cumsum(0, dtype=torch.int32) - 1
    return (
        every_rank.cumsum(0).to(torch.int32),
        no_channels,
        no_channels,
        sources,
        is_in_rank,
        torch.where(is_in_rank, positions, -1).to(torch.int32),
    )


def _worst(received: Received, num_rows: int) -> Received:
    """The same in memory for ``num_rows`` rows, about whose number the host hears nothing."""
    device_needs(
        received.ids is not None and len(received.rows) <= num_rows,
        f"{len(received.rows)} rows arrive, and num_worst_tokens is {num_rows}",
    )
    prefixes, channels, own_channels, sources, is_in_rank, heads = received.handle
    # Ids in unwritten memory are -1 already, which the vendor promises here.
    return Received(
        _extended(received.rows, num_rows),
        None if received.scales is None else _extended(received.scales, num_rows),
        None if received.ids is None else _extended(received.ids, num_rows),
        None if received.weights is None else _extended(received.weights, num_rows),
        [],
        (prefixes, channels, own_channels, _extended(sources, num_rows), is_in_rank, heads),
    )


def _extended(rows: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Rows ``[N, ...]`` at the beginning of memory for ``num_rows``."""
    more = unwritten((num_rows, *rows.shape[1:]), rows.dtype)
    # One dimension more: a tensor of one number a row has none that could become bytes.
    there = rows.contiguous().unsqueeze(-1).view(torch.uint8)
    more.unsqueeze(-1).view(torch.uint8)[: len(rows)] = there
    return more


def combine(
    group: dist.ProcessGroup,
    rows: torch.Tensor,
    handle: Handle,
    weights: torch.Tensor | None,
    biases: list[torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Bring one row of each rank home and sum them by rank in float32, rounded once."""
    prefixes, _, _, sources, is_in_rank, _ = handle
    need(rows.dim() == 2 and rows.is_contiguous(), "x.dim() == 2 and x.is_contiguous()")
    need(rows.dtype is torch.bfloat16, 'false and "Unsupported type"')
    need(sources.shape[0] == rows.shape[0], "src_idx.size(0) == num_tokens")
    there = prefixes[:, group.rank()].diff(prepend=prefixes.new_zeros(1)).tolist()
    num_rows = sum(there)
    parts = [rows[:num_rows], sources[:num_rows]]
    if weights is not None:
        need(weights.dtype is torch.float32, "topk_weights->scalar_type() == torch::kFloat32")
        parts.append(weights[:num_rows])
    arrived, counts = exchange(group, parts, there)
    num_tokens = is_in_rank.shape[0]
    summed = torch.zeros(num_tokens, rows.shape[1])
    for bias in biases:
        need(bias.shape == summed.shape and bias.dtype is rows.dtype, "bias.size(0) is that of x")
        summed += bias.float()
    summed_weights = None if weights is None else torch.zeros(num_tokens, weights.shape[1])
    for pieces in zip(*(one.split(counts) for one in arrived), strict=True):
        tokens = pieces[1].long()
        summed[tokens] += pieces[0].float()
        if summed_weights is not None:
            summed_weights[tokens] += pieces[2]
    return summed.to(rows.dtype), summed_weights
