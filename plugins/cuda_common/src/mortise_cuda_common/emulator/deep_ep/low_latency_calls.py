"""The calls of a low-latency exchange, with the vendor's names and arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from mortise_cuda_common.emulator.deep_ep import low_latency
from mortise_cuda_common.emulator.deep_ep.event import EventOverlap
from mortise_cuda_common.emulator.deep_ep.memory import BufferMemory
from mortise_cuda_common.emulator.deep_ep.packets import unwritten
from mortise_cuda_common.emulator.deep_ep.refusal import need

Rows = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
Hook = Callable[[], None] | None


class LowLatencyCalls(BufferMemory):
    """Exchanges of fixed shapes."""

    def low_latency_dispatch(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        num_max_dispatch_tokens_per_rank: int,
        num_experts: int,
        cumulative_local_expert_recv_stats: torch.Tensor | None = None,
        dispatch_wait_recv_cost_stats: torch.Tensor | None = None,
        use_fp8: bool = True,
        round_scale: bool = False,
        use_ue8m0: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
    ) -> tuple[Rows, torch.Tensor, tuple[Any, ...], EventOverlap, Hook]:
        """Send each token once for each of its experts, into memory of fixed size.

        Returns:
            Rows ``[E_l, G * max, H]``, with their scales if they are fp8; int32 ``[E_l]`` how many
            are valid; what ``low_latency_combine`` needs; an event; what receives them, if asked
            for: until it was called everything is poison.

        Raises:
            RuntimeError: what the library refuses, or where the device would hang.
            AssertionError: queues that are too short.
        """
        need(self.low_latency_mode, "low_latency_mode")
        assert self.nvshmem_qp_depth >= (num_max_dispatch_tokens_per_rank + 1) * 2
        shape = low_latency.Shape(
            num_max_dispatch_tokens_per_rank,
            x.shape[1],
            num_experts,
            use_fp8,
            round_scale,
            use_ue8m0,
        )
        low_latency.check(shape, x, topk_idx, self.group_size, self.chip.num_sms)
        _check_statistics(cumulative_local_expert_recv_stats, dispatch_wait_recv_cost_stats)
        self.begin_low_latency("a low-latency dispatch", shape, async_finish, return_recv_hook)
        packets = low_latency.send(self.group, x, topk_idx, shape, self._generator)
        arrival = low_latency.Arrival.expected(shape, self.group_size)

        def receive() -> None:
            low_latency.receive(packets, arrival, self._generator)
            if cumulative_local_expert_recv_stats is not None:
                cumulative_local_expert_recv_stats.add_(arrival.counts)

        handle = (
            arrival.sources,
            arrival.ranges,
            num_max_dispatch_tokens_per_rank,
            x.shape[1],
            num_experts,
        )
        rows = arrival.rows if arrival.scales is None else (arrival.rows, arrival.scales)
        hook = self.received(receive, return_recv_hook)
        return rows, arrival.counts, handle, EventOverlap(), hook

    def low_latency_combine(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor,
        handle: tuple[Any, ...],
        use_logfmt: bool = False,
        zero_copy: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
        out: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, EventOverlap, Hook]:
        """Bring rows home and sum them by ``topk_weights``; -1 is skipped.

        Returns:
            bfloat16 ``[T, H]``; an event; what receives it, if asked for.

        Raises:
            RuntimeError: what the library refuses, or where the device would hang.
            NotImplementedError: what the library does, but not this.
        """
        if use_logfmt or zero_copy:
            raise NotImplementedError("use_logfmt and zero_copy are not emulated")
        need(self.low_latency_mode, "low_latency_mode")
        sources, ranges, max_tokens, hidden, num_experts = handle
        assert self.nvshmem_qp_depth >= (max_tokens + 1) * 2
        shape = low_latency.Shape(max_tokens, hidden, num_experts)
        low_latency.check_combine(shape, x, topk_idx, topk_weights, self.group_size)
        combined = _output(x, topk_weights.shape[0], out)
        self.begin_low_latency("a low-latency combine", shape, async_finish, return_recv_hook)
        home = low_latency.return_rows(self.group, x, sources, ranges, shape)

        def receive() -> None:
            combined.copy_(low_latency.weighted_sum(home, topk_idx, topk_weights, shape))

        return combined, EventOverlap(), self.received(receive, return_recv_hook)


def _output(x: torch.Tensor, num_tokens: int, out: torch.Tensor | None) -> torch.Tensor:
    """Memory of the sums, undefined until they are received."""
    shape = (num_tokens, x.shape[2])
    undefined = unwritten(shape, x.dtype)
    if out is None:
        return undefined
    need(out.is_contiguous() and tuple(out.shape) == shape, "out->size(0) == num_combined_tokens")
    need(out.dtype is x.dtype, "out->scalar_type() == x.scalar_type()")
    return out.copy_(undefined)


def _check_statistics(counts: torch.Tensor | None, costs: torch.Tensor | None) -> None:
    if counts is not None:
        need(
            counts.dtype is torch.int32,
            "cumulative_local_expert_recv_stats->scalar_type() == torch::kInt",
        )
    if costs is not None:
        raise NotImplementedError("dispatch_wait_recv_cost_stats is not emulated")
