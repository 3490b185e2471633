"""The calls of a normal exchange, with the vendor's names and arguments."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mortise_cuda_common.emulator.deep_ep import normal
from mortise_cuda_common.emulator.deep_ep.event import EventOverlap
from mortise_cuda_common.emulator.deep_ep.memory import BufferMemory
from mortise_cuda_common.emulator.deep_ep.refusal import need

if TYPE_CHECKING:
    from mortise_cuda_common.emulator.deep_ep.config import Config

Rows = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


class NormalCalls(BufferMemory):
    """Exchanges of variable size."""

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
            int32 ``[G]`` tokens to each rank; None, as within one machine; int32 ``[E]`` choices of
            each expert; bool ``[T, G]`` whether a token goes to a rank; an event.

        Raises:
            RuntimeError: what the library refuses.
        """
        need(topk_idx.dim() == 2, "topk_idx.dim() == 2")
        need(topk_idx.is_contiguous(), "topk_idx.is_contiguous()")
        need(topk_idx.dtype is torch.int64, "expected scalar type Long")
        need(num_experts > 0, "num_experts > 0")
        _check_streams(previous_event, async_finish, allocate_on_comm_stream)
        found = normal.layout_of(topk_idx, num_experts, self.group_size)
        return found.per_rank, None, found.per_expert, found.is_in_rank, EventOverlap()

    def dispatch(
        self,
        x: Rows,
        handle: normal.Handle | None = None,
        num_tokens_per_rank: torch.Tensor | None = None,
        num_tokens_per_rdma_rank: torch.Tensor | None = None,
        is_token_in_rank: torch.Tensor | None = None,
        num_tokens_per_expert: torch.Tensor | None = None,
        topk_idx: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        expert_alignment: int = 1,
        num_worst_tokens: int = 0,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[
        Rows,
        torch.Tensor | None,
        torch.Tensor | None,
        list[int],
        normal.Handle,
        EventOverlap,
    ]:
        """Send each token once to every rank that holds one of its experts.

        Returns:
            What came, by source rank and token, in the form of ``x``; int64 local experts of each
            row, -1 for those of others; their weights, 0 likewise; rows of each local expert; what
            ``combine`` needs; an event.

        Raises:
            RuntimeError: what the library refuses.
            NotImplementedError: what the library does, but not this.
        """
        if handle is not None:
            raise NotImplementedError("a dispatch by the handle of another is not emulated")
        config = self.get_dispatch_config(self.group_size) if config is None else config
        assert num_tokens_per_rank is not None
        assert is_token_in_rank is not None
        assert num_tokens_per_expert is not None
        _check_streams(previous_event, async_finish, allocate_on_comm_stream)
        rows, scales = x if isinstance(x, tuple) else (x, None)
        layout = normal.Layout(num_tokens_per_rank, num_tokens_per_expert, is_token_in_rank)
        sent = normal.Sent(rows, scales, topk_idx, topk_weights, layout)
        normal.check_sent(sent, self.group_size, config, self.num_nvl_bytes)
        self.begin_normal("a normal dispatch", rows.shape[1], rows.element_size())
        got = normal.dispatch(self.group, sent, expert_alignment, num_worst_tokens)
        received = got.rows if got.scales is None else (got.rows, got.scales)
        return received, got.ids, got.weights, got.counts, got.handle, EventOverlap()

    def combine(
        self,
        x: torch.Tensor,
        handle: normal.Handle,
        topk_weights: torch.Tensor | None = None,
        bias: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None = None,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, EventOverlap]:
        """Sum the ranks' rows of each token, without any weight.

        Returns:
            bfloat16 ``[T, H]``; the sums of the weights ``[T, K]`` if there are; an event.

        Raises:
            RuntimeError: what the library refuses.
        """
        _check_streams(previous_event, async_finish, allocate_on_comm_stream)
        biases = [] if bias is None else [bias] if isinstance(bias, torch.Tensor) else list(bias)
        self.begin_normal("a normal combine", x.shape[1], x.element_size())
        summed, weights = normal.combine(self.group, x, handle, topk_weights, biases)
        return summed, weights, EventOverlap()


def _check_streams(
    previous_event: EventOverlap | None, async_finish: bool, allocate_on_comm_stream: bool
) -> None:
    if allocate_on_comm_stream:
        need(previous_event is not None and async_finish, "previous_event.has_value() and async")
