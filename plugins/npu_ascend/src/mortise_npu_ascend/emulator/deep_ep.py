"""DeepEP's port to Ascend for CPU tensors: what arrives, in which order, and what is refused."""

# Names, arguments and results are those of sgl-kernel-npu's ``deep_ep`` (MIT licence, commit
# f425bdf1), so that code which calls the one calls the other.

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NoReturn

import torch
import torch.distributed as dist

from mortise_npu_ascend.emulator.generation import Generation
from mortise_npu_ascend.emulator.poison import unwritten
from mortise_npu_ascend.environment import VendorEnvironment

if TYPE_CHECKING:
    from collections.abc import Callable

    from mortise_npu_ascend.emulator.chip import EmulatedChip

QUANT_MODES: Final = frozenset(
    {"bf16", "int8", "mx_fp8_e4m3", "mx_fp8_e5m2", "pertoken_fp8_e4m3", "mx_fp4_e2m1"}
)
WORLD_SIZES: Final = frozenset({2, 4, 8, 16, 24, 32, 64, 128, 144, 160})
MOST_TOKENS: Final = 8192
MOST_LOW_LATENCY_TOKENS: Final = 512
MOST_EXPERTS: Final = 512
MOST_CHOICES: Final = 16


@dataclass(frozen=True)
class EmulatedDeepEp:
    """What stands in for the module ``deep_ep`` on one emulated chip.

    Attributes:
        chip: which.
        environment: the variables that the library would find.
    """

    chip: EmulatedChip
    environment: VendorEnvironment = VendorEnvironment()  # noqa: RUF009 - frozen

    @property
    def Buffer(self) -> type[EmulatedBuffer]:  # noqa: N802
        """The class of the buffers, which belong to this chip."""
        return type("Buffer", (EmulatedBuffer,), {"deep_ep": self})


@dataclass(frozen=True)
class Arrival:
    """Rows that came, and the way back.

    Attributes:
        payload: ``[A, H]``, by local expert, then source rank, token and choice.
        scales: float32 ``[A]``, or None.
        counts: int64 ``[E_l]``.
        order: int64 ``[A]``, which row in the order of arrival each of them was.
        received: rows from each rank.
        sent: rows to each rank.
        choices: int64 ``[S]``, the choice that each sent row was for, in the order of sending.
    """

    payload: torch.Tensor
    scales: torch.Tensor | None
    counts: torch.Tensor
    order: torch.Tensor
    received: list[int]
    sent: list[int]
    choices: torch.Tensor


class EventOverlap:
    """Stands for an event that has happened."""

    def current_stream_wait(self) -> None:
        """Nothing to wait for."""


class EmulatedBuffer:
    """``deep_ep.Buffer`` over torch.distributed, of one emulated chip.

    Args:
        group: the ranks.
        num_nvl_bytes: not used, nor are the others that are not named below.
        low_latency_mode: whether low-latency exchanges may go through it.
    """

    deep_ep: EmulatedDeepEp

    def __init__(
        self,
        group: dist.ProcessGroup,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        low_latency_mode: bool = False,
        num_qps_per_rank: int = 12,
        allow_nvlink_for_low_latency_mode: bool = True,
        allow_mnnvl: bool = False,
        normal_strategy: str = "default",
        low_latency_strategy: str = "default",
    ) -> None:
        if self.deep_ep.environment.strategy not in (None, "default"):
            raise NotImplementedError(
                f"the exchange {self.deep_ep.environment.strategy!r} is not emulated"
            )
        self.group = group
        self.rank = group.rank()
        self.group_size = group.size()
        self.low_latency_mode = low_latency_mode

    def get_dispatch_layout(
        self,
        topk_idx: torch.Tensor,
        num_experts: int,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor, EventOverlap]:
        """How many rows go where.

        Returns:
            int32 ``[G]`` tokens to each rank; None; int32 ``[E]`` rows to each expert; int32
            ``[T, G]`` whether a token goes to a rank; an event.

        Raises:
            RuntimeError: what the library refuses.
        """
        _need(topk_idx.dim() == 2, "topk_idx.dim() == 2")
        _need(topk_idx.is_contiguous(), "topk_idx.is_contiguous()")
        num_tokens = topk_idx.shape[0]
        _need(
            num_tokens <= MOST_TOKENS,
            f"num_tokens ({num_tokens}) must not exceed the configured capacity ({MOST_TOKENS}), "
            f"calculated as round (1) * per_round_tokens ({MOST_TOKENS}).",
        )
        valid = topk_idx[topk_idx >= 0]
        per_expert = torch.bincount(valid, minlength=num_experts).to(torch.int32)
        ranks = torch.where(topk_idx < 0, -1, topk_idx // (num_experts // self.group_size))
        in_rank = (ranks.unsqueeze(2) == torch.arange(self.group_size)).any(1).to(torch.int32)
        return in_rank.sum(0, dtype=torch.int32), None, per_expert, in_rank, EventOverlap()

    def dispatch(
        self,
        x: torch.Tensor,
        handle: tuple[Any, ...] | None = None,
        num_tokens_per_rank: torch.Tensor | None = None,
        num_tokens_per_rdma_rank: torch.Tensor | None = None,
        is_token_in_rank: torch.Tensor | None = None,
        num_tokens_per_expert: torch.Tensor | None = None,
        topk_idx: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        expert_alignment: int = 1,
        num_worst_tokens: int = 0,
        config: object | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
        dispatch_wait_recv_cost_stats: torch.Tensor | None = None,
        quant_mode: str | None = None,
    ) -> tuple[Any, torch.Tensor, torch.Tensor, list[int], tuple[Any, ...], EventOverlap]:
        """Send each token once for each of its experts.

        Returns:
            Rows ``[A, H]``, or int8 rows with their scales ``[A]``, at least one where none came;
            two tensors of no meaning; rows of each local expert, or where they end if the
            environment says so; what ``combine`` needs, with the routing weights; an event.

        Raises:
            RuntimeError: what the library refuses.
            ValueError: no such ``quant_mode``.
            NotImplementedError: a handle is given again; or what the library does, but not this.
        """
        if handle is not None:
            raise NotImplementedError("Optional communication handle is not supported yet.")
        assert num_tokens_per_rank is not None
        assert is_token_in_rank is not None
        assert num_tokens_per_expert is not None
        assert topk_idx is not None
        self._check_internode()
        quantised = self._normal_quantises(quant_mode)
        self._check_rows(x, topk_idx, topk_weights, num_tokens_per_expert.shape[0])
        _need(
            config is not None or self.group_size in WORLD_SIZES,
            f"Unsupported number of EP ranks: {self.group_size}",
        )
        _need(num_tokens_per_expert.dtype == torch.int32, "num_tokens_per_expert is int")
        arrival = self._send(x, topk_idx, num_tokens_per_expert.shape[0], quantised)
        num_rows = arrival.payload.shape[0]
        rows = _at_least_one(arrival.payload)
        scales = None if arrival.scales is None else _at_least_one(arrival.scales)
        kept = (None, None, None, arrival, is_token_in_rank, None, topk_idx, topk_weights)
        choices = topk_idx.shape[1]
        return (
            rows if scales is None else (rows, scales),
            unwritten((num_rows, choices), torch.int64),
            unwritten((num_rows, choices), torch.float32),
            self._numbers(arrival.counts).tolist(),
            kept,
            EventOverlap(),
        )

    def combine(
        self,
        x: torch.Tensor,
        handle: tuple[Any, ...],
        topk_weights: torch.Tensor | None = None,
        bias: object | None = None,
        config: object | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
        combine_send_cost_stats: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, None, EventOverlap]:
        """Bring rows home and sum them by the weights of the dispatch; ``topk_weights`` is unused.

        Raises:
            RuntimeError: what the library refuses.
        """
        _need(x.dim() == 2 and x.is_contiguous(), "x.dim() == 2 and x.is_contiguous()")
        arrival, topk_idx, weights = handle[3], handle[6], handle[7]
        if weights is None:
            weights = torch.ones(topk_idx.shape)
        return self._return(x, arrival, topk_idx, weights), None, EventOverlap()

    def low_latency_dispatch(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        num_max_dispatch_tokens_per_rank: int,
        num_experts: int,
        cumulative_local_expert_recv_stats: torch.Tensor | None = None,
        use_fp8: bool = True,
        round_scale: bool = False,
        use_ue8m0: bool = False,
        use_mxfp4: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
        topk_weights: torch.Tensor | None = None,
        quant_mode: str | None = None,
    ) -> tuple[Any, torch.Tensor, tuple[Any, ...], EventOverlap, Callable[[], None]]:
        """Send each token once for each of its experts, into memory of fixed size.

        ``quant_mode`` None and ``use_fp8`` True, both defaults, are int8.

        Returns:
            Rows ``[R, H]``, of which the first are those that came, or int8 rows with their scales;
            int64 ``[E_l]`` as of ``dispatch``; what ``low_latency_combine`` needs; an event; what
            would wait for the rows.

        Raises:
            RuntimeError: what the library refuses, or what the device does not.
            ValueError: no such ``quant_mode``.
            NotImplementedError: what the library does, but not this.
        """
        _need(self.low_latency_mode, "low_latency_mode")
        capacity = num_max_dispatch_tokens_per_rank
        _need(capacity >= x.shape[0], "num_max_dispatch_tokens_per_rank >= x.size(0)")
        _need(
            0 < capacity <= MOST_LOW_LATENCY_TOKENS,
            f"xShape dims0(BS) should be in [0, {MOST_LOW_LATENCY_TOKENS}], but got {capacity}.",
        )
        if quant_mode is None and use_fp8:
            quant_mode = "mx_fp8_e4m3" if use_ue8m0 else "int8"
        if quant_mode is None and use_mxfp4:
            quant_mode = "mx_fp4_e2m1"
        if quant_mode not in QUANT_MODES - {"bf16"} | {None}:
            raise ValueError(f"Unsupported quant_mode: {quant_mode}")
        if quant_mode not in (None, "int8"):
            self._refuse_mode(quant_mode)
        self._check_rows(x, topk_idx, topk_weights, num_experts, low_latency=True)
        _device_needs(bool((topk_idx >= 0).all()), "-1 among topk_idx: MOE_ENABLE_TOPK_NEG_ONE")
        sorted_ids = topk_idx.sort(1).values
        _device_needs(
            bool((sorted_ids.diff(dim=1) != 0).all()), "an expert that one token names twice"
        )
        arrival = self._send(x, topk_idx, num_experts, quant_mode == "int8")
        most_experts = min(topk_idx.shape[1], num_experts // self.group_size)
        num_rows = capacity * self.group_size * most_experts
        rows = _padded(arrival.payload, num_rows)
        recv = rows if arrival.scales is None else (rows, _padded(arrival.scales, num_rows))
        counts = self._numbers(arrival.counts)
        kept = (arrival, None, capacity, x.shape[1], num_experts, counts, None)
        return recv, counts, kept, EventOverlap(), lambda: None

    def low_latency_combine(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor,
        handle: tuple[Any, ...],
        zero_copy: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
        out: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, EventOverlap, Callable[[], None]]:
        """Bring rows home and sum them by ``topk_weights``.

        Raises:
            RuntimeError: what the library refuses.
        """
        _need(
            x.dim() == 2 and x.is_contiguous() and x.dtype == torch.bfloat16,
            "x.dim() == 2 and x.is_contiguous() and x.scalar_type() == at::kBFloat16",
        )
        arrival: Arrival = handle[0]
        combined = self._return(x[: arrival.payload.shape[0]], arrival, topk_idx, topk_weights)
        return combined, EventOverlap(), lambda: None

    def _normal_quantises(self, quant_mode: str | None) -> bool:
        if quant_mode is None:
            return self.deep_ep.environment.forces_int8
        if quant_mode not in QUANT_MODES:
            raise ValueError(
                f"Invalid quant_mode: {quant_mode}. Valid options: {sorted(QUANT_MODES)}"
            )
        if quant_mode not in ("bf16", "int8"):
            self._refuse_mode(quant_mode)
        return quant_mode == "int8"

    def _refuse_mode(self, quant_mode: str) -> NoReturn:
        if self.deep_ep.chip.generation is Generation.A5:
            raise NotImplementedError(f"quant_mode {quant_mode} is not emulated")
        raise RuntimeError(
            f"{quant_mode} is not supported on this device, please use int8 or bf16 instead."
        )

    def _check_internode(self) -> None:
        if self.deep_ep.chip.generation is Generation.A2 and self.group_size >= 16:
            raise NotImplementedError("the exchange between machines of A2 is not emulated")

    def _check_rows(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor | None,
        num_experts: int,
        *,
        low_latency: bool = False,
    ) -> None:
        _need(x.dim() == 2 and x.is_contiguous(), "x.dim() == 2 and x.is_contiguous()")
        _need(x.dtype == torch.bfloat16, f"x should be bfloat16, got {x.dtype}")
        _need(topk_idx.dim() == 2 and topk_idx.is_contiguous(), "topk_idx is contiguous")
        _need(x.shape[0] == topk_idx.shape[0], "num_tokens == topk_idx.size(0)")
        _need(
            topk_weights is None or topk_weights.dtype == torch.float32,
            "topk_weights.scalar_type() == at::kFloat",
        )
        lowest, step = self._hidden_sizes(low_latency)
        _need(
            lowest <= x.shape[1] <= 7168 and x.shape[1] % step == 0,
            f"xShape dims1(H) should be in [{lowest}, 7168], but got {x.shape[1]}.",
        )
        _need(num_experts % self.group_size == 0, "num_experts % num_ranks == 0")
        _need(num_experts <= MOST_EXPERTS, f"moeExpertNum should be at most {MOST_EXPERTS}")
        _need(topk_idx.shape[1] <= MOST_CHOICES, f"K should be at most {MOST_CHOICES}")

    def _hidden_sizes(self, low_latency: bool) -> tuple[int, int]:
        """The smallest, and what all are a multiple of; the largest is 7168."""
        if self.deep_ep.chip.generation is not Generation.A2:
            return 1024, 1
        return (32, 32) if low_latency else (7168, 1)

    def _numbers(self, counts: torch.Tensor) -> torch.Tensor:
        return counts.cumsum(0) if self.deep_ep.environment.counts_are_ends else counts

    def _send(
        self, x: torch.Tensor, topk_idx: torch.Tensor, num_experts: int, quantised: bool
    ) -> Arrival:
        num_local, choices = num_experts // self.group_size, topk_idx.shape[1]
        rows, scales = _quantised(x) if quantised else (x, None)
        experts_F = topk_idx.flatten()
        order_F = experts_F.argsort(stable=True)
        choices_S = order_F[experts_F[order_F] >= 0]
        tokens_S, experts_S = choices_S // max(choices, 1), experts_F[choices_S]
        parts = [_bytes(rows[tokens_S]), _bytes(experts_S % num_local)]
        if scales is not None:
            parts.append(_bytes(scales[tokens_S]))
        sent = torch.bincount(experts_S // num_local, minlength=self.group_size)
        packets, received = self._exchange(torch.cat(parts, dim=1), sent.tolist())
        sizes = [part.shape[1] for part in parts]
        row_bytes, expert_bytes, *scale_bytes = packets.split(sizes, dim=1)
        local_A = _from_bytes(expert_bytes, torch.int64).flatten()
        order_A = local_A.argsort(stable=True)
        arrived = _from_bytes(row_bytes, rows.dtype)[order_A]
        return Arrival(
            payload=arrived,
            scales=_from_bytes(scale_bytes[0], torch.float32).flatten()[order_A]
            if scale_bytes
            else None,
            counts=torch.bincount(local_A, minlength=num_local),
            order=order_A,
            received=received,
            sent=sent.tolist(),
            choices=choices_S,
        )

    def _return(
        self, x: torch.Tensor, arrival: Arrival, topk_idx: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        num_rows = arrival.payload.shape[0]
        back = x.new_empty(num_rows, x.shape[1])
        back[arrival.order] = x[:num_rows]
        packets, _ = self._exchange(_bytes(back), arrival.received)
        home = torch.zeros(topk_idx.numel(), x.shape[1])
        home[arrival.choices] = _from_bytes(packets, x.dtype).float()
        by_choice = home.view(*topk_idx.shape, x.shape[1])
        summed = torch.zeros(topk_idx.shape[0], x.shape[1])
        for choice in range(topk_idx.shape[1]):
            there = (topk_idx[:, choice] >= 0).unsqueeze(1)
            weighted = by_choice[:, choice] * weights[:, choice].unsqueeze(1)
            summed += torch.where(there, weighted, 0)
        return summed.to(x.dtype)

    def _exchange(self, packets: torch.Tensor, sent: list[int]) -> tuple[torch.Tensor, list[int]]:
        """Send each rank its packets ``[S, bytes]``; what came, and how many from each."""
        counts = torch.empty(self.group_size, dtype=torch.int64)
        dist.all_to_all_single(counts, torch.tensor(sent), group=self.group)
        received: list[int] = counts.tolist()
        came = packets.new_empty(sum(received), packets.shape[1])
        dist.all_to_all_single(came, packets.contiguous(), received, sent, group=self.group)
        return came, received


def _quantised(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 rows and the scale of each: the numbers times ``127 / amax``, halves to even."""
    factors = 127.0 / x.float().abs().amax(1)
    rows = (x.float() * factors.unsqueeze(1)).nan_to_num(0.0).round().to(torch.int8)
    return rows, 1.0 / factors


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    rows = tensor.unsqueeze(1) if tensor.dim() == 1 else tensor
    return rows.clone(memory_format=torch.contiguous_format).view(torch.uint8)


def _from_bytes(packets: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return packets.clone(memory_format=torch.contiguous_format).view(dtype)


def _at_least_one(rows: torch.Tensor) -> torch.Tensor:
    return rows if rows.shape[0] else unwritten((1, *rows.shape[1:]), rows.dtype)


def _padded(rows: torch.Tensor, num_rows: int) -> torch.Tensor:
    out = unwritten((num_rows, *rows.shape[1:]), rows.dtype)
    out[: rows.shape[0]] = rows
    return out


def _need(condition: bool, what: str) -> None:
    if not condition:
        raise RuntimeError(f"Failed: Assertion error '{what}'")


def _device_needs(condition: bool, what: str) -> None:
    if not condition:
        raise RuntimeError(f"emulated DeepEP: the device's answer to this is undefined: {what}")
