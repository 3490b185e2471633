"""The exchange of fixed shapes: a row for each token and expert, in no order that is promised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch

from mortise.formats.fp8 import pack_ue8m0
from mortise_cuda_common.emulator.deep_ep.packets import exchange, unwritten
from mortise_cuda_common.emulator.deep_ep.refusal import device_needs, need
from mortise_cuda_common.emulator.deep_ep.rounding import rounded

if TYPE_CHECKING:
    import torch.distributed as dist

HIDDEN_SIZES: Final = (2048, 2560, 3072, 4096, 5120, 6144, 7168, 8192)
MOST_CHOICES: Final = 11
MOST_WARP_GROUPS: Final = 14

_COUNT_BITS: Final = 32


@dataclass(frozen=True, slots=True)
class Shape:
    """What all ranks must say alike.

    Attributes:
        max_tokens: of one rank.
        hidden: H.
        num_experts: E.
        use_fp8, round_scale, use_ue8m0: how rows travel.
    """

    max_tokens: int
    hidden: int
    num_experts: int
    use_fp8: bool = False
    round_scale: bool = False
    use_ue8m0: bool = False


@dataclass(frozen=True, slots=True)
class Arrival:
    """Memory of the results, undefined until they were received.

    Attributes:
        rows: ``[E_l, G * max_tokens, H]`` of bfloat16 or e4m3.
        scales: float32 ``[.., H/128]`` or int32 ``[.., H/512]``, the row the fastest index.
        counts: int32 ``[E_l]``.
        sources: int32 ``[E_l, G * max_tokens]``, the token of each row at its own rank.
        ranges: int64 ``[E_l, G]``: where the rows of a rank begin, times 2^32, plus their number.
    """

    rows: torch.Tensor
    scales: torch.Tensor | None
    counts: torch.Tensor
    sources: torch.Tensor
    ranges: torch.Tensor

    @classmethod
    def expected(cls, shape: Shape, num_ranks: int) -> Arrival:
        """Memory for the rows of all ranks."""
        num_local, places = shape.num_experts // num_ranks, num_ranks * shape.max_tokens
        dtype = torch.float8_e4m3fn if shape.use_fp8 else torch.bfloat16
        scales = None
        if shape.use_fp8:
            columns, kind = (512, torch.int32) if shape.use_ue8m0 else (128, torch.float32)
            scales = unwritten((num_local, shape.hidden // columns, places), kind).transpose(1, 2)
        return cls(
            rows=unwritten((num_local, places, shape.hidden), dtype),
            scales=scales,
            counts=unwritten((num_local,), torch.int32),
            sources=unwritten((num_local, places), torch.int32),
            ranges=unwritten((num_local, num_ranks), torch.int64),
        )


@dataclass(frozen=True, slots=True)
class Packets:
    """Rows that came: values, scales if any, local experts ``[N]``, tokens at home ``[N]``."""

    rows: torch.Tensor
    scales: torch.Tensor | None
    experts: torch.Tensor
    tokens: torch.Tensor
    counts: list[int]


def check(shape: Shape, x: torch.Tensor, ids: torch.Tensor, num_ranks: int, num_sms: int) -> None:
    """Refuse what ``low_latency_dispatch`` refuses.

    Raises:
        RuntimeError: with its condition, or with what its kernel would do wrong.
    """
    need(
        x.dim() == 2 and x.is_contiguous() and x.dtype is torch.bfloat16,
        "x.dim() == 2 and x.is_contiguous() and x.scalar_type() == torch::kBFloat16",
    )
    need(
        x.shape[1] % 16 == 0 and x.shape[1] % 128 == 0,
        "x.size(1) % sizeof(int4) == 0 and x.size(1) % 128 == 0",
    )
    need(ids.dim() == 2 and ids.is_contiguous(), "topk_idx.dim() == 2 and topk_idx.is_contiguous()")
    need(
        x.shape[0] == ids.shape[0] and x.shape[0] <= shape.max_tokens,
        "x.size(0) == topk_idx.size(0) and x.size(0) <= num_max_dispatch_tokens_per_rank",
    )
    need(ids.dtype is torch.int64, "topk_idx.scalar_type() == topk_idx_t")
    need(shape.num_experts % num_ranks == 0, "num_experts % num_ranks == 0")
    need(
        num_ranks * shape.max_tokens % 4 == 0,
        '(num_ranks * num_max_dispatch_tokens_per_rank) % 4 == 0 and "TMA requires the number of'
        ' tokens to be multiple of 4"',
    )
    if shape.use_fp8:
        need(shape.hidden % 512 == 0, "hidden % 512 == 0")
    if shape.use_ue8m0:
        need(shape.round_scale, 'round_scale and "UE8M0 SF requires `round_scale=True`"')
    need(ids.shape[1] <= MOST_CHOICES, "num_topk <= kNumMaxTopK")
    need(shape.hidden in HIDDEN_SIZES, 'false and "Unsupported hidden"')
    device_needs(
        -(-shape.num_experts // num_sms) <= MOST_WARP_GROUPS,
        f"{shape.num_experts} experts on {num_sms} multiprocessors: num_warp_groups < 15",
    )
    device_needs(
        ids.numel() == 0 or int(ids.max()) < shape.num_experts, "an expert that is not there"
    )
    device_needs(
        _most_of_one_expert(ids) <= shape.max_tokens,
        "more rows for one expert than num_max_dispatch_tokens_per_rank, since tokens name it"
        " twice: they overwrite those of another rank",
    )


def _most_of_one_expert(ids: torch.Tensor) -> int:
    chosen = ids[ids >= 0]
    return int(chosen.bincount().max()) if chosen.numel() else 0


def send(
    group: dist.ProcessGroup,
    x: torch.Tensor,
    ids: torch.Tensor,
    shape: Shape,
    generator: torch.Generator,
) -> Packets:
    """Send a row for each choice; those of one expert in an order that nobody knows."""
    num_local = shape.num_experts // group.size()
    values, scales = rounded(x, round_scale=shape.round_scale) if shape.use_fp8 else (x, None)
    if scales is not None and shape.use_ue8m0:
        scales = pack_ue8m0(scales)
    experts = ids.flatten()
    choices = torch.randperm(experts.numel(), generator=generator)
    choices = choices[experts[choices] >= 0]
    choices = choices[(experts[choices] // num_local).argsort(stable=True)]
    token = choices // max(ids.shape[1], 1)
    parts = [
        values.view(torch.uint8)[token],
        (experts[choices] % num_local).to(torch.int32),
        token.to(torch.int32),
    ]
    if scales is not None:
        parts.append(scales[token])
    to_rank = torch.bincount(experts[choices] // num_local, minlength=group.size())
    arrived, counts = exchange(group, parts, to_rank.tolist())
    return Packets(
        rows=arrived[0].view(values.dtype),
        scales=arrived[3] if scales is not None else None,
        experts=arrived[1],
        tokens=arrived[2],
        counts=counts,
    )


def receive(packets: Packets, arrival: Arrival, generator: torch.Generator) -> None:
    """Put rows where the results have them: the ranks' one behind the other, in any order."""
    num_ranks = len(packets.counts)
    source = torch.repeat_interleave(torch.arange(num_ranks), torch.tensor(packets.counts))
    for expert in range(arrival.counts.shape[0]):
        begin = 0
        for rank in torch.randperm(num_ranks, generator=generator).tolist():
            found = ((packets.experts == expert) & (source == rank)).nonzero().flatten()
            place = slice(begin, begin + len(found))
            arrival.rows.view(torch.uint8)[expert, place] = packets.rows.view(torch.uint8)[found]
            arrival.sources[expert, place] = packets.tokens[found]
            if arrival.scales is not None and packets.scales is not None:
                arrival.scales[expert, place] = packets.scales[found]
            arrival.ranges[expert, rank] = (begin << _COUNT_BITS) | len(found)
            begin += len(found)
        arrival.counts[expert] = begin


def check_combine(
    shape: Shape, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, num_ranks: int
) -> None:
    """Refuse what ``low_latency_combine`` refuses.

    Raises:
        RuntimeError: with its condition.
    """
    need(
        x.dim() == 3 and x.is_contiguous() and x.dtype is torch.bfloat16,
        "x.dim() == 3 and x.is_contiguous() and x.scalar_type() == torch::kBFloat16",
    )
    need(x.shape[0] == shape.num_experts // num_ranks, "x.size(0) == num_experts / num_ranks")
    need(
        x.shape[1] == num_ranks * shape.max_tokens,
        "x.size(1) == num_ranks * num_max_dispatch_tokens_per_rank",
    )
    need(x.shape[2] in HIDDEN_SIZES, 'false and "Unsupported hidden"')
    need(ids.dim() == 2 and ids.is_contiguous(), "topk_idx.dim() == 2 and topk_idx.is_contiguous()")
    need(ids.dtype is torch.int64, "topk_idx.scalar_type() == topk_idx_t")
    need(ids.shape == weights.shape, "topk_idx.size(0) == topk_weights.size(0)")
    need(weights.is_contiguous(), "topk_weights.dim() == 2 and topk_weights.is_contiguous()")
    need(weights.dtype is torch.float32, "topk_weights.scalar_type() == torch::kFloat32")
    need(
        weights.shape[0] <= shape.max_tokens,
        "topk_weights.size(0) <= num_max_dispatch_tokens_per_rank",
    )
    need(ids.shape[1] <= MOST_CHOICES, "num_topk <= kNumMaxTopk")


def return_rows(
    group: dist.ProcessGroup,
    x: torch.Tensor,
    sources: torch.Tensor,
    ranges: torch.Tensor,
    shape: Shape,
) -> torch.Tensor:
    """What comes home, ``[E * max_tokens, H]``: the row of an expert and token; else undefined."""
    num_ranks, num_local = group.size(), x.shape[0]
    rows, experts, tokens, counts = [], [], [], []
    for rank in range(num_ranks):
        sent = 0
        for expert in range(num_local):
            packed = int(ranges[expert, rank])
            begin, count = packed >> _COUNT_BITS, packed & ((1 << _COUNT_BITS) - 1)
            device_needs(0 <= begin <= begin + count <= x.shape[1], "rows that were not received")
            rows.append(x[expert, begin : begin + count])
            tokens.append(sources[expert, begin : begin + count])
            number = group.rank() * num_local + expert
            experts.append(torch.full((count,), number, dtype=torch.int32))
            sent += count
        counts.append(sent)
    parts = [torch.cat(rows), torch.cat(experts), torch.cat(tokens)]
    (came, of_expert, of_token), _ = exchange(group, parts, counts)
    home = unwritten((shape.num_experts * shape.max_tokens, x.shape[2]), x.dtype)
    home[of_expert.long() * shape.max_tokens + of_token.long()] = came
    return home


def weighted_sum(
    home: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, shape: Shape
) -> torch.Tensor:
    """Sum each token's rows by weight, choice after choice in float32, rounded once."""
    token = torch.arange(ids.shape[0])
    summed = torch.zeros(ids.shape[0], home.shape[1])
    for choice in range(ids.shape[1]):
        expert = ids[:, choice]
        rows = home[expert.clamp(min=0) * shape.max_tokens + token].float()
        weighted = rows * weights[:, choice].unsqueeze(1)
        summed += torch.where((expert >= 0).unsqueeze(1), weighted, 0.0)
    return summed.to(home.dtype)
